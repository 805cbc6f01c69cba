"""`Predictor`: latencies of iterations and quanta, learnt while the engine serves.

It has two stages, as in Harli (arXiv 2511.11729). The first is a linear model of the batch per regime, prefill and
decode, fitted online and only from iterations without training: otherwise it would take the interference for the
engine's own latency. The second is the overlap, the part of a quantum's time by which an iteration is delayed: all of
it on a CPU, less where both run at once on a GPU. Pure: no clock, no torch. All times are seconds.
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
"""Latest iterations per regime that a fit uses."""
REFIT_EVERY = 32
"""Iterations of a regime between two fits."""
HIGH = 0.95
"""Quantile of observed / expected latencies that `Predictor.high` multiplies with."""
ENOUGH_FOR_HIGH = 40
"""Iterations below which the largest ratio is taken instead: few residuals of a fit are closer to it than new ones."""
SHORTEST_S = 1e-9
"""Expected latencies are taken to be no shorter, so that ratios to them are finite."""
QUANTUM_HISTORY = 128
"""Latest quanta per kind and size over which their P99 is taken."""
OVERLAP_RATE = 0.05
"""Weight of a new value in the moving average of the overlap."""

Regime = Literal["prefill", "decode"]


@dataclass(frozen=True)
class Batch:
    """The work of one iteration, in the numbers that its latency depends on."""

    regime: Regime
    requests: int
    new_tokens: int = 0
    """Prefill: prompt tokens computed now."""
    attended: int = 0
    """Prefill: pairs of tokens that attention computes, Σ over requests of new · (new / 2 + cached)."""
    cached_tokens: int = 0
    """Tokens in the KV cache that the batch reads: prefixes in prefill, whole contexts in decode."""

    def features(self) -> tuple[float, ...]:
        """Return the inputs of the regime's linear model, a constant 1 first."""
        if self.regime == "prefill":
            return 1.0, float(self.new_tokens), float(self.attended), float(self.cached_tokens)
        return 1.0, float(self.requests), float(self.cached_tokens)


class PredictorState(BaseModel):
    """Fitted models as they are saved between two starts of an engine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str = ""
    """`calibration_key` of the conditions under which they were fitted."""
    coefficients: dict[Regime, tuple[float, ...]] = {}
    high: dict[Regime, float] = {}
    typical: dict[Regime, float] = {}


class Predictor:
    """Learns from every iteration and quantum, and predicts the next one."""

    def __init__(self) -> None:
        self._models: dict[Regime, _Regime] = {"prefill": _Regime(8), "decode": _Regime(16)}
        self._quanta: dict[tuple[str, int], deque[float]] = {}
        self._quantum_high: dict[tuple[str, int], float] = {}
        self._seen: Counter[tuple[str, int]] = Counter()
        self._planned: float | None = None
        self._in_use: set[tuple[str, int]] = set()
        self.overlap = 1.0
        """Seconds by which one second of quanta delays an iteration; 1 where they take turns."""

    @property
    def state(self) -> PredictorState:
        """Return the models fitted so far."""
        known = {regime: model for regime, model in self._models.items() if model.coefficients is not None}
        return PredictorState(
            coefficients={regime: model.coefficients for regime, model in known.items() if model.coefficients},
            high={regime: model.ratio_high for regime, model in known.items()},
            typical={regime: model.typical for regime, model in known.items()},
        )

    def resume(self, state: PredictorState) -> None:
        """Start from the models that an earlier engine has learnt."""
        for regime, coefficients in state.coefficients.items():
            model = self._models[regime]
            model.coefficients = coefficients
            model.ratio_high, model.typical = state.high[regime], state.typical[regime]

    @property
    def ready(self) -> bool:
        """Return whether prefill and decode can both be predicted."""
        return all(model.coefficients is not None for model in self._models.values())

    def observe(self, batch: Batch, seconds: float, trained: float = 0.0) -> None:
        """Learn from an iteration that took `seconds`, in which `trained` seconds of quanta are included."""
        model = self._models[batch.regime]
        if trained <= 0:
            model.observe(batch, seconds)
        elif model.coefficients is not None:
            felt = (seconds - model.expected(batch)) / trained
            self.overlap += OVERLAP_RATE * (min(max(felt, 0.0), 2.0) - self.overlap)

    def expected(self, batch: Batch) -> float:
        """Return the typical latency of an iteration without training; 0 while its regime is unknown."""
        return self._models[batch.regime].expected(batch)

    def high(self, batch: Batch) -> float:
        """Return the latency without training that a share `HIGH` of such iterations stays under.

        Before `ENOUGH_FOR_HIGH` of them were seen it is the highest, in proportion, of those that were.
        """
        model = self._models[batch.regime]
        return model.expected(batch) * model.ratio_high

    def typical(self, regime: Regime) -> float:
        """Return the median latency of the last iterations without training; 0 before the first fit."""
        return self._models[regime].typical

    def seed_quantum(self, kind: str, tokens: int, seconds: float) -> None:
        """Set a quantum's P99 from a calibration; observations replace it as they come."""
        key = (kind, _size(tokens))
        self._quantum_high[key] = max(seconds, self._quantum_high.get(key, 0.0))

    def observe_quantum(self, quantum: Quantum, seconds: float) -> None:
        """Learn from a quantum that took `seconds`."""
        key = (quantum.kind, _size(quantum.tokens))
        self._in_use.add(key)
        seen = self._quanta.setdefault(key, deque(maxlen=QUANTUM_HISTORY))
        seen.append(seconds)
        self._seen[key] += 1
        # A new longest one counts at once; a shorter P99 may wait for every sixteenth look.
        if seconds > self._quantum_high.get(key, 0.0) or self._seen[key] % 16 == 0:
            self._quantum_high[key] = float(np.quantile(seen, 0.99, method="higher"))

    def quantum_high(self, quantum: Quantum) -> float:
        """Return the P99 of quanta like this one; the longest of its kind if the size is new, 0 if the kind is."""
        key = (quantum.kind, _size(quantum.tokens))
        if key in self._quantum_high:
            return self._quantum_high[key]
        return max((high for (kind, _), high in self._quantum_high.items() if kind == quantum.kind), default=0.0)

    def plan_quanta(self, longest: float) -> None:
        """Note that pieces have another size from now on, of which the longest is expected to take `longest`."""
        self._planned = longest
        self._in_use.clear()

    def longest_quantum(self) -> float:
        """Return the largest P99 of quanta seen since `plan_quanta`; before that call, of all known ones."""
        if self._planned is None:
            return max(self._quantum_high.values(), default=0.0)
        return max((self._quantum_high[key] for key in self._in_use), default=self._planned)


def _size(tokens: int) -> int:
    """Round up to a power of two, so that the measurements of one length serve its neighbours as well."""
    return 1 << (tokens - 1).bit_length() if tokens > 0 else 0


class _Regime:
    """Latency model of prefill or decode: non-negative least squares on relative errors, and their quantile."""

    def __init__(self, enough: int) -> None:
        self.enough = enough
        """Iterations before the first fit; until then nothing is trained while users are served."""
        self.coefficients: tuple[float, ...] | None = None
        self.ratio_high = 1.0
        """Quantile `HIGH` of observed / expected, or the largest while they are few."""
        self.typical = 0.0
        self._features: deque[tuple[float, ...]] = deque(maxlen=HISTORY)
        self._seconds: deque[float] = deque(maxlen=HISTORY)
        self._since_fit = 0
        self._few = False
        """Whether the last fit had fewer iterations than a quantile wants."""

    def observe(self, batch: Batch, seconds: float) -> None:
        self._features.append(batch.features())
        self._seconds.append(seconds)
        self._since_fit += 1
        due = self._since_fit >= REFIT_EVERY or (self.coefficients is None and len(self._seconds) >= self.enough)
        if due and len(self._seconds) >= self.enough:
            self._fit()
        elif self._few:
            self.ratio_high = max(self.ratio_high, seconds / max(self.expected(batch), SHORTEST_S))

    def expected(self, batch: Batch) -> float:
        if self.coefficients is None:
            return 0.0
        return sum(weight * value for weight, value in zip(self.coefficients, batch.features(), strict=True))

    def _fit(self) -> None:
        rows: npt.NDArray[np.float64] = np.array(self._features)
        seconds: npt.NDArray[np.float64] = np.array(self._seconds)
        # Rows are divided by the observed seconds, so that short and long iterations count alike.
        weights, _ = nnls(rows / seconds[:, None], np.ones(len(seconds)))
        ratios = seconds / np.maximum(rows @ weights, SHORTEST_S)
        self.coefficients = tuple(float(weight) for weight in weights)
        self._few = len(ratios) < ENOUGH_FOR_HIGH
        self.ratio_high = float(ratios.max() if self._few else np.quantile(ratios, HIGH))
        self.typical = float(np.median(seconds))
        self._since_fit = 0
