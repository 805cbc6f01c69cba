"""Governors and a predictor of the compared systems, which decide in umbel's place when its co-trainer trains."""

import math
from collections import deque
from typing import Any

import numpy as np

from serving.cotrainer.governor import Finished, Load, SloGovernor
from serving.cotrainer.predictor import Batch, Predictor
from serving.cotrainer.slo import Slo

AIMD_STEP = 0.02
"""Part of S_tpot that each request in time adds to the seconds per iteration; a late one halves them."""
SHORTEST_S = 1e-6
"""Shortest predicted quantum, so that none fits into a budget of 0 s."""


class StepPredictor(Predictor):
    """Predicts iterations as another predictor does, and takes a whole optimizer step for one quantum."""

    def __init__(self, known: Predictor) -> None:
        super().__init__()
        self.resume(known.state)
        self._steps: deque[float] = deque(maxlen=64)

    def observe_step(self, seconds: float) -> None:
        """Learn from a step that took `seconds`."""
        self._steps.append(seconds)

    def observe_quantum(self, quantum: Any, seconds: float, busy: bool = True) -> None:
        pass

    def quantum_high(self, quantum: Any) -> float:
        return self.longest_quantum()

    def longest_quantum(self, *, busy: bool = False) -> float:
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
