"""Runs a site without an engine or a model: daemon, control API, journal, jobs and deployer are real; ready at once.

    python tests/toys/sites/quick_site.py site.toml

Training adds a number to B, and the loss falls with it: every version is better than its parent. Versions that the file
`against` in the state directory names, one to a line, are worse here. For tests of what the centre and sites agree on.
"""

import argparse
import asyncio
import os
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from client import daemon, site
from client.data import fresh
from client.data.prepare import Prepared
from client.rounds import jobs
from serving.scores import Scores
from serving.trainer_socket import CoTrainerStatus, EvaluateJob, TrainJob
from tests.toys.sites.no_engine import NoEngine
from umbel import peft_dir
from umbel.adapter import AdapterRef
from umbel.messages import JobState
from umbel.site.config import SiteConfig

T = TypeVar("T")

EXAMPLES, TOKENS, STEP = 40, 10, np.float32(0.5)


class NoSupervisor:
    """Stands in for `serving.supervisor.Supervisor`: ready at once, and for ever."""

    def __init__(self, config: SiteConfig, cotrainer: object, what_to_serve: object) -> None:
        self.state_dir = config.site.state_dir
        self.engine = NoEngine()
        self.loaded: set[AdapterRef] = set()
        self.starts = 1
        self.deaths_under_users = 0
        self.longest_hang_s = 60.0
        self.started_at = 0.0

    async def ready(self) -> NoEngine:
        return self.engine

    async def while_running(self, work: Coroutine[Any, Any, T]) -> T:
        return await work

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def stop(self) -> None: ...


class NoCoTrainer:
    """Stands in for `serving.trainer_socket.CoTrainerClient`: nothing trains in an engine."""

    def __init__(self, socket: Path) -> None: ...
    async def status(self, timeout_s: float, job: str | None = None) -> CoTrainerStatus:
        return CoTrainerStatus()

    async def cancel(self, job: str) -> CoTrainerStatus:
        return CoTrainerStatus()


class NoFollowing:
    """Stands in for `client.rounds.following.Following`: a job has ended as soon as it is given."""

    def __init__(self, supervisor: NoSupervisor, cotrainer: object) -> None:
        self._against = supervisor.state_dir / "against"

    async def follow(self, job: TrainJob | EvaluateJob, note: object = None) -> CoTrainerStatus:
        done = CoTrainerStatus(job=job.id, state=JobState.DONE)
        if isinstance(job, EvaluateJob):
            assert job.output is not None
            loss = np.full(EXAMPLES, self._loss(job.adapter) * TOKENS)
            Scores(loss, np.full(EXAMPLES, TOKENS, np.int32), np.zeros(EXAMPLES, np.bool_)).write(Path(job.output))
            return done
        add_to_b(Path(job.parent), Path(job.output))
        seen = job.plan.steps * job.plan.batch_size
        sums = {"steps": job.plan.steps, "examples": seen, "loss_tokens": seen * TOKENS, "loss_sum": 1.0 * seen}
        return done.model_copy(update=sums)

    def _loss(self, adapter: str | None) -> float:
        if adapter is None:
            return 100.0
        file = Path(adapter)
        if self._against.exists() and file.parent.name in self._against.read_text().split():
            return 200.0
        tensors = peft_dir.decode(file.read_bytes())
        return 100.0 - max(float(np.abs(array).max()) for name, array in tensors.items() if ".lora_B." in name)


def add_to_b(parent: Path, trained: Path) -> None:
    """Add a number to B, as if it had been trained."""
    tensors = peft_dir.decode(parent.read_bytes())
    more = {name: array + STEP * (".lora_B." in name) for name, array in tensors.items()}
    peft_dir.replace_durably(trained, peft_dir.encode(more))


async def no_data(*_: object) -> Prepared:
    """Stand in for `client.data.prepare.prepare_in_child`: there is nothing to read."""
    held = {"held_examples": EXAMPLES, "held_loss_tokens": EXAMPLES * TOKENS}
    return Prepared(Path("none"), Path("none"), EXAMPLES, EXAMPLES, EXAMPLES * TOKENS, held=held)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("site", type=Path)
    instead = {"Supervisor": NoSupervisor, "CoTrainerClient": NoCoTrainer}
    for name, replacement in instead.items():
        setattr(site, name, replacement)
    fresh.prepare_in_child = no_data
    jobs.Following = NoFollowing
    os.environ["UMBEL_SITE__TRAINING__WORTH"] = "all"  # there is no example by which anything could be measured
    asyncio.run(daemon.serve(SiteConfig.load(parser.parse_args().site)))


if __name__ == "__main__":
    main()
