"""How long an iteration will take: alone, from what is in the batch; beside training, from the quanta that run with it.

Two stages, as in Harli (arXiv 2511.11729). The first is a linear model per regime, prefill and decode, fitted online
and only from iterations without training: else it would learn the interference as if it were the engine's own. The
second is how much of a quantum's time an iteration feels: all of it on a CPU, less where both run at once on a GPU.
Pure: no clock, no torch. All times are seconds.
"""

from collections import Counter, deque
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict
from scipy.optimize import nnls

from serving.cotrainer.quantum import Quantum

HISTORY = 512
"""Iterations per regime that a fit looks back on."""
REFIT_EVERY = 32
HIGH = 0.95
"""Quantile of observed / expected that `high` multiplies with: a margin must be relative to be one."""
QUANTUM_HISTORY = 128
OVERLAP_RATE = 0.05

Regime = Literal["prefill", "decode"]


@dataclass(frozen=True)
class Batch:
    """What one iteration computes."""

    regime: Regime
    requests: int
    new_tokens: int = 0
    """Prefill: prompt tokens computed now."""
    attended: int = 0
    """Prefill: Σ over requests of new · (new / 2 + cached), the pairs that attention looks at."""
    cached_tokens: int = 0
    """Tokens in the KV cache that the batch reads: prefixes in prefill, whole contexts in decode."""

    def features(self) -> tuple[float, ...]:
        if self.regime == "prefill":
            return 1.0, float(self.new_tokens), float(self.attended), float(self.cached_tokens)
        return 1.0, float(self.requests), float(self.cached_tokens)


class PredictorState(BaseModel):
    """What is kept from one start of an engine to the next, for the same hardware, model and engine version."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str = ""
    coefficients: dict[Regime, tuple[float, ...]] = {}
    high: dict[Regime, float] = {}
    typical: dict[Regime, float] = {}


class Predictor:
    """Iteration and quantum latencies, learnt while serving."""

    def __init__(self) -> None:
        self._models: dict[Regime, _Regime] = {"prefill": _Regime(8), "decode": _Regime(16)}
        self._quanta: dict[tuple[str, int], deque[float]] = {}
        self._quantum_high: dict[tuple[str, int], float] = {}
        self._seen: Counter[tuple[str, int]] = Counter()
        self._planned: float | None = None
        self._in_use: set[tuple[str, int]] = set()
        self.overlap = 1.0
        """How many seconds an iteration is delayed by one second of quanta beside it; 1 where they take turns."""

    @property
    def state(self) -> PredictorState:
        known = {regime: model for regime, model in self._models.items() if model.coefficients is not None}
        return PredictorState(
            coefficients={regime: model.coefficients for regime, model in known.items() if model.coefficients},
            high={regime: model.ratio_high for regime, model in known.items()},
            typical={regime: model.typical for regime, model in known.items()},
        )

    def resume(self, state: PredictorState) -> None:
        """Go on from what an earlier engine has learnt."""
        for regime, coefficients in state.coefficients.items():
            model = self._models[regime]
            model.coefficients = coefficients
            model.ratio_high, model.typical = state.high[regime], state.typical[regime]

    @property
    def ready(self) -> bool:
        """Whether both regimes are known."""
        return all(model.coefficients is not None for model in self._models.values())

    def observe(self, batch: Batch, seconds: float, trained: float = 0.0) -> None:
        """An iteration took `seconds`, the quanta that ran with it, `trained` seconds of them, included."""
        model = self._models[batch.regime]
        if trained <= 0:
            model.observe(batch, seconds)
        elif model.coefficients is not None:
            felt = (seconds - model.expected(batch)) / trained
            self.overlap += OVERLAP_RATE * (min(max(felt, 0.0), 2.0) - self.overlap)

    def expected(self, batch: Batch) -> float:
        """An iteration's typical latency without training; 0 while nothing is known."""
        return self._models[batch.regime].expected(batch)

    def high(self, batch: Batch) -> float:
        """The latency without training that an iteration stays under in `HIGH` of all cases."""
        model = self._models[batch.regime]
        return model.expected(batch) * model.ratio_high

    def typical(self, regime: Regime) -> float:
        """Median latency of the last iterations without training; 0 while there were none."""
        return self._models[regime].typical

    def seed_quantum(self, kind: str, tokens: int, seconds: float) -> None:
        """What a calibration says of a quantum; observations replace it as they come."""
        key = (kind, _size(tokens))
        self._quantum_high[key] = max(seconds, self._quantum_high.get(key, 0.0))

    def observe_quantum(self, quantum: Quantum, seconds: float) -> None:
        key = (quantum.kind, _size(quantum.tokens))
        self._in_use.add(key)
        seen = self._quanta.setdefault(key, deque(maxlen=QUANTUM_HISTORY))
        seen.append(seconds)
        self._seen[key] += 1
        # A new longest counts at once; what is forgotten may wait for the next look.
        if seconds > self._quantum_high.get(key, 0.0) or self._seen[key] % 16 == 0:
            self._quantum_high[key] = float(np.quantile(seen, 0.99, method="higher"))

    def quantum_high(self, quantum: Quantum) -> float:
        """P99 of the quanta like this one; the longest of its kind where this size was never seen."""
        key = (quantum.kind, _size(quantum.tokens))
        if key in self._quantum_high:
            return self._quantum_high[key]
        return max((high for (kind, _), high in self._quantum_high.items() if kind == quantum.kind), default=0.0)

    def plan_quanta(self, longest: float) -> None:
        """From now on quanta are cut otherwise, the longest of them expected to take `longest`."""
        self._planned = longest
        self._in_use.clear()

    def longest_quantum(self) -> float:
        """The largest P99 of the quanta that are in use: all known ones, before any were planned."""
        if self._planned is None:
            return max(self._quantum_high.values(), default=0.0)
        return max((self._quantum_high[key] for key in self._in_use), default=self._planned)


def _size(tokens: int) -> int:
    """The next power of two: rows have any length, and what is learnt of one should serve its neighbours."""
    return 1 << (tokens - 1).bit_length() if tokens > 0 else 0


class _Regime:
    """Latency of one kind of iteration: non-negative least squares on relative errors, and their quantile."""

    def __init__(self, enough: int) -> None:
        self.enough = enough
        """Iterations without training before it is known; until then nothing is trained while users wait."""
        self.coefficients: tuple[float, ...] | None = None
        self.ratio_high = 1.0
        self.typical = 0.0
        self._features: deque[tuple[float, ...]] = deque(maxlen=HISTORY)
        self._seconds: deque[float] = deque(maxlen=HISTORY)
        self._since_fit = 0

    def observe(self, batch: Batch, seconds: float) -> None:
        self._features.append(batch.features())
        self._seconds.append(seconds)
        self._since_fit += 1
        due = self._since_fit >= REFIT_EVERY or (self.coefficients is None and len(self._seconds) >= self.enough)
        if due and len(self._seconds) >= self.enough:
            self._fit()

    def expected(self, batch: Batch) -> float:
        if self.coefficients is None:
            return 0.0
        return sum(weight * value for weight, value in zip(self.coefficients, batch.features(), strict=True))

    def _fit(self) -> None:
        rows: npt.NDArray[np.float64] = np.array(self._features)
        seconds: npt.NDArray[np.float64] = np.array(self._seconds)
        # Divided by what was observed, so that short and long iterations count alike.
        weights, _ = nnls(rows / seconds[:, None], np.ones(len(seconds)))
        ratios = seconds / np.maximum(rows @ weights, 1e-9)
        self.coefficients = tuple(float(weight) for weight in weights)
        self.ratio_high = float(np.quantile(ratios, HIGH))
        self.typical = float(np.median(seconds))
        self._since_fit = 0
