"""A site's scripted life, each step as the centre or an operator asks for it, and asks again after a kill."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from client.journal import Journal
from client.rounds import following
from client.rounds.folder import PERSONAL
from client.versions.background import Background
from client.versions.loading import Loading
from client.versions.serve_only import ServeOnly
from client.versions.served import Served
from serving.supervisor import Supervisor
from serving.trainer_socket import CoTrainerStatus, EvaluateJob, TrainJob
from tests.toys.cotrainer import PARENT, ToyCoTrainer, order, toy_jobs
from tests.toys.deployment import SHAPES, Deployment, quick, scores, until
from tests.toys.engine import MEASURED, ToyMachine, site_config
from tests.toys.rehearsal import rehearse
from tests.toys.sites.peft_directory import peft_directory
from umbel import peft_dir
from umbel.adapter import Lifecycle, Personal
from umbel.errors import EngineError
from umbel.messages import JobState

OWN = Personal(part="adapter", rank=1)


class BetterEachTime(ToyCoTrainer):
    """Every version is better than the one before, so that each is in favour. Each round leaves a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.reaches = 1

    def _ended(self, status: CoTrainerStatus, job: TrainJob | EvaluateJob) -> CoTrainerStatus:
        ended = super()._ended(status, job)
        if isinstance(job, EvaluateJob):
            version = int(Path(job.adapter).parent.name.rpartition("-v")[2]) if job.adapter else 0
            scores(2.0 - version / 10).write(Path(str(job.output)))
        return ended


class Life(Deployment):
    """One run of a daemon: all of it is real but the engine and the training."""

    def __init__(self, state_dir: Path) -> None:
        self.config = site_config(state_dir, adapters=("support", "billing"))
        self.machine = ToyMachine()
        self.journal = Journal(state_dir / "journal.sqlite3")
        self.served = Served(self.config, self.journal, SHAPES)
        self.supervisor = Supervisor(self.config, MEASURED, self.served)
        cotrainer = BetterEachTime()
        self.jobs = toy_jobs(state_dir, self.config, self.journal, self.supervisor, cotrainer)
        self.billing = toy_jobs(state_dir, self.config, self.journal, self.supervisor, cotrainer, adapter="billing")
        self.background = Background()
        self.loading = Loading(self.config, self.supervisor, self.served, self.background)
        self.deployer = self._deployer()
        self.serve_only = ServeOnly(self.config, self.supervisor, self.served, self.loading, self.background)

    @classmethod
    @asynccontextmanager
    async def of(cls, state_dir: Path) -> Any:
        """A daemon from its start, as `client.daemon.serve` starts one, to its end."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(following, "POLL_S", 0.002)
            life = cls(state_dir)
            quick(patch, life.machine)
            life.resume()
            async with asyncio.timeout(20), life:
                queues = [asyncio.create_task(jobs.run()) for jobs in (life.jobs, life.billing)]
                try:
                    await life.ready()
                    yield life
                finally:
                    for queue in queues:
                        queue.cancel()
                    await asyncio.gather(*queues, return_exceptions=True)

    def live(self) -> str | None:
        ref = self.journal.alias("support", "live")
        return str(ref) if ref else None

    async def deploy_as(self, version: int, **facts: Any) -> None:
        """Push a version, wait for its verdict, promote it."""
        ref = self.push(version, **facts)
        assert (await self.judged(ref)).state in (Lifecycle.JUDGED, Lifecycle.LIVE)
        await self.deployer.promote(ref)

    async def reject(self, version: int) -> None:
        ref = self.push(version)
        await self.judged(ref)
        await self.deployer.discard(ref)

    async def roll_back(self, instead_of: str | None) -> None:
        """Roll back once, as an operator who looks first: a second roll-back would undo the first."""
        if self.live() == instead_of:
            await self.deployer.roll_back()

    async def train(self, key: str, number: int, **plan: Any) -> None:
        """Train a round of both adapters at the same time, under the same key."""
        rounds = self.config.site.state_dir / "rounds"
        for jobs in (self.jobs, self.billing):
            jobs.submit(order(key, round=number, plan=plan), PARENT)
        for jobs in (self.jobs, self.billing):
            await until(lambda jobs=jobs: jobs.report(key).state.final)  # type: ignore[misc]
            assert jobs.report(key).state is JobState.DONE
        await until(lambda: not list(rounds.glob(f"*/{key}/{PERSONAL}")))

    async def serve(self, name: str, seed: int) -> None:
        """Load an adapter that is only served, as an operator who asks again when the engine dies."""
        folder = peft_directory(self.config.site.state_dir.parent / f"peft-{seed}", seed)
        while True:
            try:
                await self.serve_only.load(name, folder)
                return
            except EngineError:
                await self.ready()
                await self.quiet()

    async def unserve(self, name: str) -> None:
        """Unload it, as an operator who asks until it is gone."""
        if self.journal.imported.find(name):
            await self.serve_only.unload(name)


STEPS: list[Callable[[Life], Awaitable[None]]] = [
    lambda site: site.deploy_as(1),
    lambda site: site.roll_back("support@v1"),
    lambda site: site.roll_back(None),
    lambda site: site.train("test-1-r", 1, personal=OWN),
    lambda site: site.deploy_as(2),
    lambda site: site.deploy_as(3, personal=OWN),
    lambda site: site.roll_back("support@v3"),
    lambda site: site.reject(4),
    lambda site: site.train("test-2-r", 2),
    lambda site: site.serve("legal", 1),
    lambda site: site.serve("code", 2),
    lambda site: site.serve("legal", 3),
    lambda site: site.unserve("code"),
]
"""At the end v2 answers, v3 is what answered before, v1 is retired and v4 rejected; `legal` is the second of two."""


async def live_on(site: Life, done: Path) -> None:
    """The steps that are left; `done` remembers how many are behind."""
    while (behind := steps_behind(done)) < len(STEPS):
        await STEPS[behind](site)
        await site.quiet()
        peft_dir.replace_durably(done, str(behind + 1).encode())


def steps_behind(done: Path) -> int:
    return int(done.read_text()) if done.exists() else 0


def state(site: Life) -> dict[str, object]:
    """Everything that a site has to remember."""
    folder = site.config.site.state_dir
    files = [path for name in ("adapters", "rounds", "personal", "served") for path in (folder / name).rglob("*")]
    return {
        "aliases": site.table().model_dump(),
        "versions": {str(v.ref): (v.state, v.report.verdict) for v in site.journal.versions()},
        "rounds": {
            (adapter, key): site.journal.rounds(adapter).get(key)[1] for adapter, key in site.journal.known_rounds()
        },
        "files": {  # adapter_config.json names the base by its path
            str(path.relative_to(folder)): path.read_bytes().replace(str(folder).encode(), b"")
            for path in files
            if path.is_file()
        },
    }


async def life(state_dir: Path, done: Path) -> None:
    async with Life.of(state_dir) as site:
        await live_on(site, done)


if __name__ == "__main__":
    rehearse(lambda state_dir, done: asyncio.run(life(Path(state_dir), Path(done))))
