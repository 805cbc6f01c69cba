"""`BenchCoTrainer`: all compared systems in one engine, switched at run time by another governor and other pieces.

It is registered as SGLang plugin `umbel_bench` in place of `umbel`. All the rest is umbel's own co-trainer, unchanged,
and so is the trainer in a process of its own (`serving.bench.separate`).
"""

import copy
import math
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from serving import plugin
from serving.bench.plan import Policy
from serving.cotrainer.cotrainer import CoTrainer, clock
from serving.cotrainer.governor import Finished, Governor, Load, SloGovernor
from serving.cotrainer.predictor import Batch, Predictor
from serving.cotrainer.quantum import Pieces
from serving.cotrainer.slo import Slo
from serving.trainer_socket import CoTrainerSettings, StatusQuery
from umbel import wire

AIMD_STEP = 0.02
"""Part of S_tpot that each request in time adds to the seconds per iteration; a late one halves them."""
NAP_S = 1e-3
"""Sleep of the unpaced thread after which another one has had the lock."""
SHORTEST_S = 1e-6
"""Shortest predicted quantum, so that none fits into a budget of 0 s."""


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
        self._training = threading.Lock()
        """Held by whichever thread runs a quantum or changes the job."""
        self._wanted = False
        """True while the scheduler's thread waits for the lock."""
        self._unpaced = threading.Event()
        """Set while the unpaced thread trains. It sleeps otherwise: polling would slow the engine down."""
        self.governor = Closed()

    def build(self, served: torch.nn.Module, model_path: str) -> None:
        """Make the trainer, and start the thread of `unpaced`."""
        super().build(served, model_path)
        threading.Thread(target=self._train_unpaced, daemon=True).start()

    def obey(self, payload: bytes) -> None:
        """Carry out a message, `UseSystem` included, while the unpaced thread is between two quanta."""
        kind, _ = wire.unpack(payload)
        if kind == StatusQuery.__name__:
            super().obey(payload)
            return
        self._wanted = True
        with self._training:
            self._wanted = False
            if kind == UseSystem.__name__:
                self._use(wire.unpack_model(payload, UseSystem))
            else:
                super().obey(payload)

    def _use(self, system: UseSystem) -> None:
        """Become another system: set its predictor, governor and targets, and count requests from zero."""
        self.system = system
        (self._unpaced.set if system.policy == "unpaced" else self._unpaced.clear)()
        slo = Slo.usual(system.ttft_s, system.tpot_s)
        umbels = system.policy in ("slo", "slo_pause") or (system.policy == "rest" and not system.disturbed)
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
        if self.system.policy in ("slo", "slo_pause", "aimd"):
            super().tune(now, idle)
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
            goes_on = super().advance()
        self.counts.last_quantum_s = clock() - began
        self.predictor.observe_step(self.counts.last_quantum_s)
        return goes_on

    def _train_unpaced(self) -> None:
        """Run quantum after quantum, whatever the engine does: the body of the unpaced thread."""
        while self._unpaced.wait():
            with self._training:
                ran = self._unpaced.is_set() and super().advance()
            if not ran or self._wanted:  # a lock is not fair: give it away
                time.sleep(NAP_S)


def whole(micro_batch: int, seq_len: int) -> Pieces:
    """Return pieces that cut no sub-block: the least time in sum."""
    return Pieces.whole(micro_batch, seq_len)


def governor_of(system: UseSystem, slo: Slo, predictor: Predictor) -> Governor:
    """Return the governor that implements a policy."""
    match system.policy:
        case "slo" | "slo_steps":
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


class StepPredictor(Predictor):
    """Predicts iterations as another predictor does, and takes a whole optimizer step for one quantum."""

    def __init__(self, known: Predictor) -> None:
        super().__init__()
        self.resume(known.state)
        self._steps: deque[float] = deque(maxlen=64)

    def observe_step(self, seconds: float) -> None:
        """Learn from a step that took `seconds`."""
        self._steps.append(seconds)

    def observe_quantum(self, quantum: Any, seconds: float) -> None:
        pass

    def quantum_high(self, quantum: Any) -> float:
        return self.longest_quantum()

    def longest_quantum(self) -> float:
        return max(SHORTEST_S, float(np.quantile(self._steps, 0.99)) if self._steps else 0.0)


class Closed:
    """Never trains in the engine's own loop. Base of the governors below."""

    slo: Slo | None = None

    def budget(self, load: Load, now: float) -> float:
        return 0.0

    def wait(self, now: float) -> float:
        return math.inf

    def ran(self, seconds: float, now: float) -> None: ...

    def iterated(self, batch: Batch, seconds: float) -> None: ...

    def finished(self, request: Finished, now: float) -> None: ...


class Unpaced(Closed):
    """Always trains: for a trainer in a process of its own, whose pace the operating system sets."""

    def wait(self, now: float) -> float:
        return 0.0


class WhenIdle(Closed):
    """Trains only while nobody has been served for `delay` seconds."""

    def __init__(self, delay: float) -> None:
        self._delay, self._busy_at = delay, -math.inf

    def budget(self, load: Load, now: float) -> float:
        self._busy_at = now
        return 0.0

    def wait(self, now: float) -> float:
        return max(0.0, self._busy_at + self._delay - now)


class EverySoOften(Closed):
    """Trains every `period` seconds, even if requests wait."""

    def __init__(self, period: float, predictor: Predictor) -> None:
        self._period, self._predictor, self._due = period, predictor, 0.0

    def budget(self, load: Load, now: float) -> float:
        return self._predictor.longest_quantum() if now >= self._due else 0.0  # room for one stop, and no second one

    def wait(self, now: float) -> float:
        return max(0.0, self._due - now)

    def ran(self, seconds: float, now: float) -> None:
        if now >= self._due:
            self._due = now - seconds + self._period


class Aimd(Closed):
    """Trains some seconds per iteration, without a predictor: more after a request in time, half after a late one."""

    def __init__(self, slo: Slo) -> None:
        self.slo: Slo | None = slo
        self._target, self._seconds = slo, AIMD_STEP * slo.tpot_s

    def budget(self, load: Load, now: float) -> float:
        return self._seconds

    def wait(self, now: float) -> float:
        return 0.0

    def finished(self, request: Finished, now: float) -> None:
        late = request.ttft > self._target.ttft_s or (request.tpot or 0.0) > self._target.tpot_s
        self._seconds = self._seconds / 2 if late else self._seconds + AIMD_STEP * self._target.tpot_s


class PausedByPrefill(SloGovernor):
    """Trains as umbel does, but never while a request waits for its first token."""

    def budget(self, load: Load, now: float) -> float:
        allowed = super().budget(load, now)
        return 0.0 if load.waiting else allowed
