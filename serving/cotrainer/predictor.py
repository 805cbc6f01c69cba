"""`Predictor`: latencies of iterations and quanta, learnt while the engine serves.

It has two stages, as in Harli (arXiv 2511.11729). The first is a linear model of the batch per regime, prefill and
decode, fitted online and only from iterations without training: otherwise it would take the interference for the
engine's own latency. The fit is Huber's (Robust Statistics, 1981), so that a few iterations that took much longer, or
were cut short, do not bend it. The second stage is the overlap, the part of a quantum's time by which an iteration is
delayed: all of it on a CPU, less where both run at once on a GPU. Pure: no clock, no torch. All times are seconds.
"""

import math
from collections import Counter, deque
from collections.abc import Iterable
from operator import mul
from typing import Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, model_validator
from scipy.optimize import nnls

from serving.cotrainer.quantum import Quantum

HISTORY = 512
"""Latest iterations per regime that a fit uses."""
REFIT_EVERY = 32
"""Iterations of a regime between two fits, and the first fits after twice as many each: they rest on few."""
HUBER = 1.345
"""Standard deviations of the noise from which on an iteration has less weight: 95 % efficient on normal noise."""
REWEIGHTED = 5
"""Rounds of iteratively reweighted least squares; more change the coefficients by less than the noise does."""
RIDGE = 1e-9
"""Added to the normal equations, whose diagonal is 1: features that were always in proportion share their weight."""
MAD = 1.4826
"""Standard deviation of normal noise, in its median absolute deviations."""
HIGH = 0.95
"""Quantile of observed / expected latencies that `Predictor.high` multiplies with."""
ENOUGH_FOR_HIGH = 40
"""Iterations below which the largest ratio is taken instead: few residuals of a fit are closer to it than new ones."""
OUTLIER = (2.0, 5.0)
"""While iterations are few, a ratio counts as at most this factor, or e to so many standard deviations if that is more.

Another process on the core may double a latency, and normal noise stays below 5 standard deviations; beyond both it is
an iteration that tells nothing of the next, such as the first one of a cold engine.
"""
SHORTEST_S = 1e-9
"""Expected latencies are taken to be no shorter, so that ratios to them are finite."""
QUANTUM_HISTORY = 128
"""Latest quanta per kind and size over which their P99 is taken."""
OVERLAP_RATE = 0.05
"""Weight of a new value in the moving average of the overlap."""

Regime = Literal["prefill", "decode"]


class Batch(NamedTuple):
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


def prefill_batch(requests: Iterable[tuple[int, int]]) -> Batch:
    """Return the prefill of requests, each given as the tokens to compute and the cached tokens before them."""
    count = new_tokens = attended = cached_tokens = 0
    for new, cached in requests:
        count += 1
        new_tokens += new
        attended += new * (new // 2 + cached)
        cached_tokens += cached
    return Batch("prefill", count, new_tokens, attended, cached_tokens)


class PredictorState(BaseModel):
    """Fitted models as they are saved between two starts of an engine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str = ""
    """`calibration_key` of the conditions under which they were fitted."""
    coefficients: dict[Regime, tuple[float, ...]] = {}
    high: dict[Regime, float] = {}
    typical: dict[Regime, float] = {}

    @model_validator(mode="after")
    def _one_coefficient_per_feature(self) -> Self:
        if any(len(values) != len(Batch(regime, 0).features()) for regime, values in self.coefficients.items()):
            raise ValueError("the coefficients are of other features")
        return self


class Predictor:
    """Learns from every iteration and quantum, and predicts the next one."""

    def __init__(self) -> None:
        self._models: dict[Regime, _Regime] = {"prefill": _Regime("prefill", 8), "decode": _Regime("decode", 16)}
        self._quanta: dict[tuple[str, int], deque[float]] = {}
        self._quantum_high: dict[tuple[str, int], float] = {}
        self._seen: Counter[tuple[str, int]] = Counter()
        self._planned: float | None = None
        self._in_use: dict[tuple[str, int], bool] = {}
        """Kinds and sizes since `plan_quanta` → whether any ran beside users."""
        self._extra_s = self._beside_s = 0.0
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
            self._models[regime].resume(coefficients, state.high[regime], state.typical[regime])

    @property
    def ready(self) -> bool:
        """Return whether prefill and decode can both be predicted."""
        return all(model.coefficients is not None for model in self._models.values())

    def observe(self, batch: Batch, seconds: float) -> None:
        """Learn from an iteration that took `seconds`, beside which nothing was trained."""
        self._models[batch.regime].observe(batch, seconds)

    def observe_beside(self, batch: Batch, seconds: float, trained: float, settled: bool) -> None:
        """Learn from an iteration that took `seconds`, in which `trained` seconds of quanta ended.

        A quantum may end in a later iteration than the one that it delays, so both are summed until one is `settled`:
        none is outstanding at its end.
        """
        if self.ready:
            self._extra_s += seconds - self.expected(batch)
            self._beside_s += trained
        if settled:
            self.observe_overlap(self._extra_s, self._beside_s)
            self._extra_s = self._beside_s = 0.0

    def observe_overlap(self, extra_s: float, trained_s: float) -> None:
        """Learn from a span that took `extra_s` seconds longer than its iterations alone, for `trained_s` of quanta."""
        if trained_s > 0:
            felt = extra_s / trained_s
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

    def observe_quantum(self, quantum: Quantum, seconds: float, busy: bool = True) -> None:
        """Learn from a quantum that took `seconds`, launched while the engine was `busy` or idle."""
        key = (quantum.kind, _size(quantum.tokens))
        self._in_use[key] = busy or self._in_use.get(key, False)
        seen = self._quanta.setdefault(key, deque(maxlen=QUANTUM_HISTORY))
        seen.append(seconds)
        self._seen[key] += 1
        # A new longest one counts at once; a shorter P99 may wait for every sixteenth look.
        if seconds > self._quantum_high.get(key, 0.0) or self._seen[key] % 16 == 0:
            self._quantum_high[key] = sorted(seen)[math.ceil(0.99 * (len(seen) - 1))]

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

    def longest_quantum(self, *, busy: bool = False) -> float:
        """Return the largest P99 of quanta seen since `plan_quanta`; before that call, of all known ones.

        `busy`: of those that ran beside users; an idle engine's are larger, and need not fit beside them.
        """
        if self._planned is None:
            return max(self._quantum_high.values(), default=0.0)
        seen = (self._quantum_high[key] for key, beside in self._in_use.items() if beside or not busy)
        return max(seen, default=self._planned)


def _size(tokens: int) -> int:
    """Round up to a power of two, so that the measurements of one length serve its neighbours as well."""
    return 1 << (tokens - 1).bit_length() if tokens > 0 else 0


class _Regime:
    """Latency model of prefill or decode: robust, non-negative, on relative errors; and their quantile."""

    def __init__(self, regime: Regime, enough: int) -> None:
        """Prepare the first fit after `enough` iterations; until then nothing is trained while users are served."""
        self.coefficients: tuple[float, ...] | None = None
        self.ratio_high = 1.0
        """Quantile `HIGH` of observed / expected, or the largest while they are few."""
        self.typical = 0.0
        self._rows = np.zeros((HISTORY, len(Batch(regime, 0).features())))
        self._seconds = np.zeros(HISTORY)
        self._seen = 0
        """Iterations so far; the latest overwrite the oldest of the two arrays."""
        self._fit_at = enough
        """Iterations at which the next fit is due."""
        self._most: float | None = None
        """Ratio that counts at most; None unless the last fit had fewer iterations than a quantile wants."""

    def resume(self, coefficients: tuple[float, ...], ratio_high: float, typical: float) -> None:
        self.coefficients, self.ratio_high, self.typical = coefficients, ratio_high, typical
        self._fit_at = REFIT_EVERY

    def observe(self, batch: Batch, seconds: float) -> None:
        self._rows[self._seen % HISTORY] = batch.features()
        self._seconds[self._seen % HISTORY] = max(seconds, SHORTEST_S)
        self._seen += 1
        if self._seen >= self._fit_at:
            self._fit()
        elif self._most is not None:
            ratio = seconds / max(self.expected(batch), SHORTEST_S)
            self.ratio_high = max(self.ratio_high, min(ratio, self._most))

    def expected(self, batch: Batch) -> float:
        if self.coefficients is None:
            return 0.0
        return float(sum(map(mul, self.coefficients, batch.features())))

    def _fit(self) -> None:
        rows, seconds = self._rows[: self._seen], self._seconds[: self._seen]
        coefficients = _robust_fit(rows, seconds)
        ratios = np.sort(seconds / np.maximum(rows @ coefficients, SHORTEST_S))
        count = len(ratios)
        self.coefficients = tuple(float(value) for value in coefficients)
        if count < ENOUGH_FOR_HIGH:
            factor, deviations = OUTLIER
            self._most = max(factor, math.exp(deviations * _spread(np.log(ratios), rows.shape[1])))
            self.ratio_high = min(float(ratios[-1]), self._most)
        else:  # the conformal quantile: a new ratio is below it with probability HIGH
            self._most = None
            self.ratio_high = float(ratios[min(math.ceil(HIGH * (count + 1)), count) - 1])
        self.typical = float(np.median(seconds))
        self._fit_at = self._seen + min(self._seen, REFIT_EVERY)


def _robust_fit(rows: npt.NDArray[np.float64], seconds: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return coefficients ≥ 0 for which Huber's loss of (seconds - fit) / fit is least, by reweighted least squares.

    Divided by the fit, short and long iterations count alike, and too long ones pull no less than too short ones.
    """
    fit, weights = seconds, np.ones(len(seconds))
    for _ in range(REWEIGHTED):
        root = np.sqrt(weights) / fit
        scaled, wanted = rows * root[:, None], seconds * root
        # The same least squares in as many rows as there are features: Cholesky of the normal equations, scaled to 1.
        gram = scaled.T @ scaled
        norms = np.sqrt(np.maximum(gram.diagonal(), SHORTEST_S))
        lower = np.linalg.cholesky(gram / np.outer(norms, norms) + RIDGE * np.eye(len(norms)))
        solved, _ = nnls(lower.T, np.linalg.solve(lower, scaled.T @ wanted / norms))
        coefficients: npt.NDArray[np.float64] = solved / norms
        fit = np.maximum(rows @ coefficients, SHORTEST_S)
        errors = np.abs(seconds / fit - 1)
        weights = np.minimum(1.0, HUBER * _spread(errors, rows.shape[1]) / np.maximum(errors, SHORTEST_S))
    return coefficients


def _spread(values: npt.NDArray[np.float64], fitted: int) -> float:
    """Return the standard deviation of residuals that have `fitted` coefficients less freedom, by their median."""
    freedom = max(len(values) - fitted, 1) / len(values)
    middle = len(values) // 2
    return MAD * float(np.partition(np.abs(values), middle)[middle]) / math.sqrt(freedom)
