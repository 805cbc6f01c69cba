"""`Rounds`: training as a site does it: n steps, a file, loaded and warmed, made live, the version before unloaded."""

import asyncio
import contextlib
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from serving.aliases import AliasTable
from serving.bench.metrics import Publication
from serving.bench.world import World
from serving.engine import EngineClient
from serving.run_dir import ALIASES
from serving.trainer_socket import CoTrainerClient, CoTrainerStatus, EvaluateJob, TrainJob
from umbel import peft_dir
from umbel.adapter import AdapterRef
from umbel.errors import TrainingError
from umbel.messages import JobState, TrainPlan

ADAPTER = "bench"
STEPS = 8
BATCH = 8
POLL_S = 0.05
FOREVER = 1e6


@dataclass
class Published:
    """A version that was made live. Times are seconds of `perf_counter`."""

    ref: AdapterRef
    digest: str
    trained_at: float
    live_at: float


@dataclass
class Rounds:
    """Rounds of one block. They start from the base, and take the data in the same order for every system."""

    trainer: CoTrainerClient
    engine: EngineClient
    state_dir: Path
    world: World
    kept: Path
    """Folder of every adapter that was ever trained, named by digest."""
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    """Numbers of versions; the engine never gets a name twice."""
    published: list[Published] = field(default_factory=list)
    progress: list[tuple[float, int]] = field(default_factory=list)
    """(`perf_counter`, optimizer steps so far)."""
    status: CoTrainerStatus | None = None
    """Last status of the trainer."""
    _job: str = ""
    _before: int = 0
    _loaded: list[AdapterRef] = field(default_factory=list)
    _publishing: asyncio.Task[None] | None = None

    @property
    def steps(self) -> int:
        return self.progress[-1][1] if self.progress else 0

    async def run(self, max_steps: float = FOREVER) -> None:
        """Train round after round, until cancelled or `max_steps` are done. Raises TrainingError if a round fails."""
        parent = self.world.initial / peft_dir.WEIGHTS
        for number in itertools.count():
            steps = int(min(STEPS, max_steps - self._before))
            if steps <= 0:
                return
            ref = AdapterRef(ADAPTER, next(self.numbers))
            weights = self.world.prepare_version(self.state_dir / "versions" / str(ref.version))
            plan = TrainPlan(
                rank=self.world.rank, steps=steps, seconds=FOREVER, batch_size=BATCH,
                learning_rate=self.world.learning_rate, seed=number,
            )  # fmt: skip
            self._job = ref.engine_name
            data = str(self.world.train)
            job = TrainJob(id=self._job, plan=plan, parent=str(parent), data=data, output=str(weights))
            self._note(await self.trainer.start(job))
            while self.status is None or not self.status.state.final:
                await asyncio.sleep(POLL_S)
                self._note(await self.trainer.status())
            if self.status.state is not JobState.DONE:
                raise TrainingError(f"round {number + 1} of a block ended {self.status.state}: {self.status.error}")
            self._before, self._job = self._before + steps, ""
            parent, written_at = self._keep(weights), _written_at(weights)
            if self._publishing is not None:
                await asyncio.shield(self._publishing)
            self._publishing = asyncio.create_task(self._publish(ref, parent.stem, written_at))

    async def end_window(self) -> None:
        """Note the progress at the end of the window, then cancel the round and wait for a publication in progress."""
        if self._job:
            self._note(await self.trainer.status())
            await self.trainer.cancel(self._job)
        if self._publishing is not None:
            await self._publishing

    async def clear(self) -> None:
        """Make the initial adapter live again, and unload all others."""
        await self._make_live(AdapterRef(ADAPTER, 0))
        for ref in self._loaded:
            await self.engine.unload(ref)
        self._loaded.clear()

    def _note(self, status: CoTrainerStatus) -> None:
        if status.error and status.job in (None, self._job):
            raise TrainingError(f"training failed in the middle of a block: {status.error}")
        self.status = status
        steps = self._before + (status.steps if status.job == self._job else 0)
        self.progress.append((time.perf_counter(), steps))

    def _keep(self, weights: Path) -> Path:
        """Link trained weights into the folder of all adapters; return the link."""
        kept = self.kept / f"{peft_dir.digest(weights.read_bytes())}.safetensors"
        with contextlib.suppress(FileExistsError):  # another block has trained the very same
            os.link(weights, kept)
        return kept

    async def _publish(self, ref: AdapterRef, digest: str, trained_at: float) -> None:
        older = list(self._loaded)
        self._loaded.append(ref)
        await self.engine.load(ref, self.state_dir / "versions" / str(ref.version))
        await self.engine.warm(ref)
        await self._make_live(ref)
        self.published.append(Published(ref, digest, trained_at, time.perf_counter()))
        for old in older:
            await self.engine.unload(old)
            self._loaded.remove(old)

    async def _make_live(self, ref: AdapterRef) -> None:
        table = AliasTable(base="base", adapters={ADAPTER: {"live": str(ref)}})
        table.write(self.state_dir / ALIASES)
        await self.engine.reload_aliases()


def publications(published: list[Published], began: float, firsts: dict[str, float]) -> tuple[Publication, ...]:
    """Convert the times to seconds of the block; `firsts` is version → time of its first token for a user."""
    return tuple(
        Publication(
            digest=version.digest,
            trained_at=version.trained_at - began,
            live_at=version.live_at - began,
            first_token_at=firsts.get(str(version.ref)),
        )
        for version in published
    )


async def heldout_losses(
    trainer: CoTrainerClient, world: World, kept: Path, digests: Sequence[str]
) -> dict[str, float]:
    """Have a trainer compute the held-out loss of versions in the folder `kept`; the digest "" is the initial one.

    Raises TrainingError if one cannot be evaluated.
    """
    losses = {}
    for digest in digests:
        weights = kept / f"{digest}.safetensors" if digest else world.initial / peft_dir.WEIGHTS
        await trainer.start(EvaluateJob(id=f"evaluate-{digest}", adapter=str(weights), data=str(world.heldout)))
        while not (status := await trainer.status()).state.final:
            await asyncio.sleep(0.02)
        if status.evaluation is None:
            raise TrainingError(f"{weights}: evaluating it failed: {status.error}")
        losses[digest] = status.evaluation.loss
    return losses


def _written_at(path: Path) -> float:
    """Return the time at which a file was written, on the clock of `perf_counter`."""
    return path.stat().st_mtime - time.time() + time.perf_counter()
