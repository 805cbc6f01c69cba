"""`BenchCoTrainer`: all compared systems in one engine, switched at run time by another governor and other pieces.

It is registered as SGLang plugin `umbel_bench` in place of `umbel`. All the rest is umbel's own co-trainer, unchanged,
and so is the trainer in a process of its own (`serving.bench.processes.separate`).
"""

import copy
import threading
import time
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from serving import plugin
from serving.bench.baselines import Aimd, Closed, EverySoOften, PausedByPrefill, StepPredictor, WhenIdle
from serving.bench.metrics import HOOKS, JOBLESS
from serving.bench.plan import Policy
from serving.cotrainer.cotrainer import CoTrainer, clock
from serving.cotrainer.counts import Counts
from serving.cotrainer.governor import Governor, SloGovernor
from serving.cotrainer.jobs.job import Job
from serving.cotrainer.lanes.lane import Took
from serving.cotrainer.predictor import Predictor
from serving.cotrainer.quantum import Pieces
from serving.cotrainer.slo import Slo
from serving.trainer_socket import CoTrainerSettings, CoTrainerStatus, QuantumStats, StatusQuery, TrainJob
from umbel import wire

NAP_S = 1e-3
"""Sleep of the unpaced thread after which another one has had the lock."""
LONGEST_S = 10.0
"""Longest wait for a quantum on a device, within a step that nothing interrupts."""


UMBELS = ("slo", "slo_pause", "slo_long")
"""Policies whose iterations teach umbel's predictor, in umbel's pieces."""


class UseSystem(BaseModel):
    """Message that turns the engine into another system."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: Policy
    ttft_s: float = 1.0
    tpot_s: float = 1.0
    micro_batch: int = 8
    """Rows per forward pass, for policies that do not choose the pieces themselves."""
    idle_s: float = 0.0
    """`idle_steps`: seconds without users before a step begins."""
    period_s: float = 1.0
    """`stop_the_world`: seconds from one stop to the next."""
    steps: int = 1
    """`stop_the_world`: optimizer steps per stop."""
    disturbed: bool = False
    """True while another process trains on the engine's core: the latencies are not to be learnt then."""


def register() -> None:
    """Entry point of SGLang's plugin group: umbel's router and hooks, with the co-trainer below."""
    plugin.register("serving.bench.systems:BenchCoTrainer")


class BenchCoTrainer(CoTrainer):
    """Umbel's co-trainer, or a baseline in its place."""

    def __init__(self, settings: CoTrainerSettings, run_dir: Path) -> None:
        super().__init__(settings, run_dir)
        self.system = UseSystem(policy="rest")
        self._known = self.predictor
        """Umbel's own predictor; baselines get a copy, so that they teach it nothing."""
        self._learnt: dict[str, Governor] = {}
        """Umbel's governors, which keep their margins from block to block as they do from day to day."""
        self._training = threading.RLock()
        """Held by whichever thread runs a quantum or changes the job."""
        self._wanted = False
        """True while the scheduler's thread waits for the lock."""
        self._unpaced = threading.Event()
        """Set while the unpaced thread trains. It sleeps otherwise: polling would slow the engine down."""
        self.governor = Closed()
        self._beside = Counts()
        """Time of the scheduler's thread that was no quantum."""
        self._began: float | None = None
        """Start of this block's last job, on the clock of `monotonic`; None before the first."""

    def build(self, served: torch.nn.Module, model_path: str) -> None:
        """Make the trainer, and start the thread of `unpaced`."""
        super().build(served, model_path)
        threading.Thread(target=self._train_unpaced, daemon=True).start()

    def obey(self, payload: bytes) -> Job | None:
        """Carry out a message, `UseSystem` included, while the unpaced thread is between two quanta."""
        kind, _ = wire.unpack(payload)
        if kind == StatusQuery.__name__:
            return super().obey(payload)
        self._wanted = True
        with self._training:
            self._wanted = False
            if kind == UseSystem.__name__:
                self._use(wire.unpack_model(payload, UseSystem))
                return self.job
            self._note_jobless(kind)
            return super().obey(payload)

    def between_iterations(self, scheduler: Any) -> None:
        """Do what umbel does, and count the seconds of it that were no quantum."""
        began, quanta_s = clock(), self.observer.trained
        super().between_iterations(scheduler)
        self._add(HOOKS, clock() - began - (self.observer.trained - quanta_s))

    def instead_of_sleep(self) -> bool:
        """Do what umbel does, and count the seconds of it that were no quantum."""
        began, quanta_s = clock(), self.observer.trained
        slept = super().instead_of_sleep()
        self._add(HOOKS, clock() - began - (self.observer.trained - quanta_s))
        return slept

    def status(self, job: Job | None = None, error: str = "") -> CoTrainerStatus:
        """Return the usual status, with the time beside quanta as two more kinds of them."""
        status = super().status(job, error)
        beside = {HOOKS: QuantumStats(), JOBLESS: QuantumStats(), **self._beside.quanta}
        return status.model_copy(update={"quanta": {**status.quanta, **beside}})

    def _add(self, kind: str, seconds: float) -> None:
        self._beside.ran(kind, Took(max(0.0, seconds)))

    def _note_jobless(self, kind: str) -> None:
        """Count the time since the block's last job has ended, if a new one begins."""
        if kind != TrainJob.__name__:
            return
        now = time.monotonic()
        if self._began is not None and self.job is not None:
            self._add(JOBLESS, now - self._began - self.job.seconds)
        self._began = now

    def _use(self, system: UseSystem) -> None:
        """Become another system: set its predictor, governor and targets, and count requests from zero."""
        self.system, self._began = system, None
        (self._unpaced.set if system.policy == "unpaced" else self._unpaced.clear)()
        slo = Slo.usual(system.ttft_s, system.tpot_s)
        umbels = system.policy in UMBELS or (system.policy == "rest" and not system.disturbed)
        if umbels:
            self.predictor = self._known
        elif system.policy in ("slo_steps", "idle_steps", "stop_the_world"):
            self.predictor = StepPredictor(self._known)
        else:
            self.predictor = copy.deepcopy(self._known)
        self.tuning.retarget(slo)
        self.governor = self._learnt.get(system.policy) or governor_of(system, slo, self.predictor)
        self.governor.slo = None if isinstance(self.governor, Closed) else slo
        if umbels and system.policy != "rest":
            self._learnt[system.policy] = self.governor
        self.counts.forget_requests()
        self.observer.arrivals = 0

    def tune(self, now: float, idle: bool = False) -> None:
        """Choose pieces as umbel does, or take whole sub-blocks for the other policies."""
        if self.system.policy in (*UMBELS, "aimd"):
            super().tune(now, idle or self.system.policy == "slo_long")
            return
        assert self.trainer is not None
        self.trainer.pieces = whole(self.system.micro_batch, self.settings.seq_len)

    def advance(self) -> bool:
        """Run a quantum; whole optimizer steps for policies that do not interrupt them."""
        job = self.runnable()
        if not isinstance(self.predictor, StepPredictor) or job is None:
            return super().advance()
        count = self.system.steps if self.system.policy == "stop_the_world" else 1
        began, until = clock(), job.progress.steps + count
        goes_on = True
        while goes_on and job.progress.steps < until:
            self.lane.wait(LONGEST_S)
            goes_on = super().advance()
        self.counts.last_quantum_s = clock() - began
        self.predictor.observe_step(self.counts.last_quantum_s)
        return goes_on

    def _count_ended(self) -> None:
        """Count as umbel does, unless the other thread runs a quantum, which it may not have noted yet."""
        if self._training.acquire(blocking=False):
            try:
                super()._count_ended()
            finally:
                self._training.release()

    def _train_unpaced(self) -> None:
        """Run quantum after quantum, whatever the engine does: the body of the unpaced thread."""
        while self._unpaced.wait():
            self.lane.wait(NAP_S)
            with self._training:
                ran = self._unpaced.is_set() and self.lane.ready() and super().advance()
                self._count_ended()
            if not ran or self._wanted:  # a lock is not fair: give it away
                time.sleep(NAP_S)


def whole(micro_batch: int, seq_len: int) -> Pieces:
    """Return pieces that cut no sub-block: the least time in sum."""
    return Pieces.whole(micro_batch, seq_len)


def governor_of(system: UseSystem, slo: Slo, predictor: Predictor) -> Governor:
    """Return the governor that implements a policy."""
    match system.policy:
        case "slo" | "slo_steps" | "slo_long":
            return SloGovernor(slo, predictor, share_floor=0.0, share_cap=1.0)
        case "slo_pause":
            return PausedByPrefill(slo, predictor, share_floor=0.0, share_cap=1.0)
        case "aimd":
            return Aimd(slo)
        case "idle_steps":
            return WhenIdle(system.idle_s)
        case "stop_the_world":
            return EverySoOften(system.period_s, predictor)
        case _:
            return Closed()
