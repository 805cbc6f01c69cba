"""`Queue`: a daemon's jobs, all real but the co-trainer, whose training is done after a number of polls."""

import asyncio
from collections.abc import Callable, Collection, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.data.fresh import FreshData
from client.data.prepare import Prepared
from client.journal import Journal
from client.keys import SiteKeys
from client.rounds import following
from client.rounds.jobs import Jobs
from client.rounds.measured import Measured
from client.rounds.personal import PersonalPart
from serving.aliases import AliasTable
from serving.checkpoint import CheckpointHeader, FileMark, Origin
from serving.cotrainer.checkpoints.writer import CheckpointWriter, Snapshot
from serving.supervisor import Supervisor
from serving.trainer_socket import CoTrainerStatus, EvaluateJob, TrainJob
from tests.toys.deployment import BASE, HELD_BASE, RANK, SHAPES, adapter, quick, scores, until
from tests.toys.engine import MEASURED, ToyMachine, site_config
from umbel import peft_dir
from umbel.adapter import AdapterRef
from umbel.errors import CoTrainerSilent
from umbel.messages import JobState, RoundOrder, RoundReport, TrainPlan
from umbel.site.config import SiteConfig


class ToyCoTrainer:
    def __init__(self) -> None:
        self.polls = 2
        """Number of polls after which a job is done."""
        self.unavailable = ""
        self.fails_with = ""
        self.silent = 0
        """Number of next calls that are not answered."""
        self.reaches: int | None = None
        """Step at which each round that is begun leaves a checkpoint at once; None: it leaves none."""
        self.found: list[int] = []
        """Step of the checkpoint that each round found when it was begun, 0 without one."""
        self.value: float | None = None
        """Value of one tensor of the update; None: the parent's."""
        self.hold: asyncio.Event | None = None
        """No job is done before this is set."""
        self.started: list[str] = []
        """Names of jobs behind their adapter's."""
        self.cancelled: list[str] = []
        self.evaluated: list[str] = []
        """The data of each evaluation."""
        self.shares: list[float] = []
        self.trained_on: list[str] = []
        """The directory of the data of each round that was begun."""
        self._jobs: dict[str, TrainJob | EvaluateJob] = {}
        self._statuses: dict[str, CoTrainerStatus] = {}
        self._left: dict[str, int] = {}

    def forget(self) -> None:
        """The engine is started anew."""
        self._jobs, self._statuses = {}, {}

    async def start(self, job: TrainJob | EvaluateJob) -> CoTrainerStatus:
        self._answer()
        if self.unavailable:
            return CoTrainerStatus(error=self.unavailable)
        self.started.append(job.id.partition("/")[2])
        if job.id not in self._jobs:
            self._jobs[job.id] = job
            self.shares += [job.share] if isinstance(job, TrainJob) else []
            self.trained_on += [Path(job.data).parent.name] if isinstance(job, TrainJob) else []
            if isinstance(job, TrainJob):
                self._go_on(job)
            self._statuses[job.id] = CoTrainerStatus(job=job.id, state=JobState.RUNNING, steps=1, loss_tokens=5)
            self._left[job.id] = self.polls
        return self._statuses[job.id]

    async def status(self, timeout_s: float = 0.0, job: str | None = None) -> CoTrainerStatus:
        self._answer()
        job = job or next(reversed(self._jobs), None)
        if job not in self._statuses:
            return CoTrainerStatus()
        if not self._statuses[job].state.final:
            self._left[job] = max(0, self._left[job] - 1)
            if self._left[job] == 0 and (self.hold is None or self.hold.is_set()):
                self._statuses[job] = self._ended(self._statuses[job], self._jobs[job])
        return self._statuses[job]

    async def cancel(self, job_id: str) -> CoTrainerStatus:
        self.cancelled.append(job_id.partition("/")[2])
        status = self._statuses.get(job_id, CoTrainerStatus())
        if status.job == job_id and not status.state.final:
            status = status.model_copy(update={"state": JobState.CANCELLED, "error": "cancelled"})
            self._statuses[job_id] = status
        return status

    def _go_on(self, job: TrainJob) -> None:
        assert job.checkpoint is not None
        file = Path(job.checkpoint)
        self.found.append(CheckpointHeader.read(file).steps if file.exists() else 0)
        if self.reaches is not None:
            write_checkpoint(job, self.reaches)

    def _answer(self) -> None:
        if self.silent:
            self.silent -= 1
            raise CoTrainerSilent("the co-trainer did not answer within 30 s")

    def _ended(self, status: CoTrainerStatus, job: TrainJob | EvaluateJob) -> CoTrainerStatus:
        if self.fails_with:
            return status.model_copy(update={"state": JobState.FAILED, "error": self.fails_with})
        if isinstance(job, EvaluateJob):
            self.evaluated.append(Path(job.data).name)
            found = scores(1.0 if job.adapter else 2.0)
            assert job.output is not None
            found.write(Path(job.output))
            return status.model_copy(update={"state": JobState.DONE, "evaluation": found.sums})
        tensors = peft_dir.decode(Path(job.parent).read_bytes())
        if self.value is not None:
            name = next(iter(tensors))
            tensors[name] = np.full_like(tensors[name], self.value)
        Path(job.output).write_bytes(peft_dir.encode(tensors))
        counts = {"steps": job.plan.steps, "examples": 8, "loss_tokens": 40, "loss_sum": 20.0, "seconds": 2.0,
                  "share": 0.5}  # fmt: skip
        return status.model_copy(update={"state": JobState.DONE, **counts})


PARENT = adapter(1)


def write_checkpoint(job: TrainJob, steps: int) -> None:
    """Write a checkpoint of a job as the co-trainer does, but without what was learnt."""
    mark = FileMark(path=job.data, bytes=1, changed_ns=0)
    origin = Origin(plan=job.plan, parent=FileMark.of(job.parent), data=mark)
    header = CheckpointHeader(origin=origin, rows="", drawn=0, progress={"steps": steps})
    CheckpointWriter().write(Path(str(job.checkpoint)), Snapshot(header, []))


class OnlyTheBase:
    """Stands for `Served` at a site that never got a version."""

    def what_to_serve(self, loaded: Collection[AdapterRef]) -> tuple[AliasTable, dict[AdapterRef, Path]]:
        return AliasTable(base="tiny", adapters={"support": {"live": None}}), {}


HELD = {"held_examples": 9, "held_loss_tokens": 45}
"""Of ten examples one is there twice."""


def toy_jobs(
    state_dir: Path, config: SiteConfig, journal: Journal, supervisor: Supervisor, cotrainer: Any,
    guards: dict[str, Path] | None = None, share: float = 1.0, adapter: str = "support",
) -> Jobs:  # fmt: skip
    """The jobs of a site, over ten examples that nobody reads."""
    prepared = Prepared(state_dir / "train.npy", state_dir / "eval.npy", 10, 5, 50, guards or {}, HELD)
    return Jobs(
        adapter=adapter, rounds=journal.rounds(adapter), supervisor=supervisor, cotrainer=cotrainer,
        fresh=FreshData(config, adapter, prepared), base=HELD_BASE, shapes=SHAPES, max_rank=4,
        personal=partial(PersonalPart, config, adapter),
        measured=partial(Measured, adapter=adapter, folder=state_dir / "worth" / adapter, everything=True),
        directory=state_dir / "rounds" / adapter, keys=SiteKeys(config.site), share=lambda: share,
        checkpoint_s=30.0, checkpoint_bytes=1,
    )  # fmt: skip


class Queue:
    """A daemon's jobs over a real journal and a real supervisor; a second one is what follows a kill."""

    def __init__(self, state_dir: Path, cotrainer: ToyCoTrainer, machine: ToyMachine) -> None:
        self.cotrainer: Any = cotrainer
        self.machine, self.state_dir = machine, state_dir
        config = site_config(state_dir)
        self.journal = Journal(state_dir / "journal.sqlite3")
        self.supervisor = Supervisor(config, MEASURED, OnlyTheBase())
        guards = {"triage": state_dir / "guard-triage.npy"}
        self.jobs = toy_jobs(state_dir, config, self.journal, self.supervisor, cotrainer, guards)

    def submit(self, key: str, parent: bytes = PARENT, signature: str = "", **changes: Any) -> RoundReport:
        return self.jobs.submit(order(key, parent, **changes), parent, signature)

    async def ended(self, key: str) -> RoundReport:
        await until(lambda: self.jobs.report(key).state.final)
        return self.jobs.report(key)

    async def restart_engine(self, under_a_user: bool = False) -> None:
        starts = self.supervisor.starts
        state = self.machine.engines[-1].state
        if under_a_user and state is not None:
            state.begin(bytes([1]) * 16)
        self.machine.kill()
        self.cotrainer.forget()
        await until(lambda: self.supervisor.engine is not None and self.supervisor.starts > starts)


def order(key: str, parent: bytes = PARENT, **changes: Any) -> RoundOrder:
    plan = TrainPlan(**{"rank": RANK, "steps": 4, "seconds": 9.0, **changes.pop("plan", {})})
    fields = {"key": key, "base": BASE.digest, "parent": peft_dir.digest(parent), "round": 1, "plan": plan}
    return RoundOrder.model_validate({**fields, **changes})


Story = Callable[[Queue], Coroutine[Any, Any, None]]
Run = Callable[[Story], None]


def runner(state_dir: Path, cotrainer: ToyCoTrainer, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that tells a story of one daemon's run; each call is another run over the same directory."""
    machine = ToyMachine()
    quick(monkeypatch, machine)
    monkeypatch.setattr(following, "POLL_S", 0.002)

    async def main(story: Story) -> None:
        queue = Queue(state_dir, cotrainer, machine)
        tasks = [asyncio.create_task(work) for work in (queue.supervisor.run(), queue.jobs.run())]
        try:
            async with asyncio.timeout(30):
                await story(queue)
        finally:
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
            await queue.supervisor.stop()
            queue.journal.close()
        assert all(isinstance(end, asyncio.CancelledError) for end in ends), ends

    return lambda story: asyncio.run(main(story))
