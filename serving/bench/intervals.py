"""`Interval`: an estimate with its confidence interval, and `Outcome`: what it says about a claim. Pure.

Intervals are two-sided at `CONFIDENCE`: a claim that is false is called met in at most 2.5 % of runs.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt
from scipy.special import betaincinv, stdtrit

CONFIDENCE = 0.95
NONE = "–"


class Outcome(StrEnum):
    """What a measurement says about a claim."""

    MET = "met"
    MISSED = "missed"
    UNKNOWN = "cannot tell"
    """The interval has values on both sides of the bound."""
    UNMEASURED = "not measured"


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its interval; NaN without an estimate, 0 and infinity without an interval."""

    value: float
    low: float
    high: float
    note: str = ""
    """What the estimate is over, or why there is none."""

    def outcome(self, least: float = -math.inf, most: float = math.inf) -> Outcome:
        """Judge the claim that the true value lies in [least, most]: by the interval, not by the estimate."""
        if least <= self.low and self.high <= most:
            return Outcome.MET
        return Outcome.MISSED if self.high < least or self.low > most else Outcome.UNKNOWN

    def text(self, digits: int = 2) -> str:
        """Return "0.63 (0.53–0.68)"; the note in place of an interval that there is none of."""
        if math.isnan(self.value):
            return f"{NONE} ({self.note})" if self.note else NONE
        if math.isinf(self.high):
            return f"{self.value:.{digits}f} ({self.note})"
        return f"{self.value:.{digits}f} ({self.low:.{digits}f}–{self.high:.{digits}f})"


def agreed(outcomes: Iterable[Outcome]) -> Outcome:
    """Return the outcome that all intervals of one claim have, or that one cannot tell."""
    found = set(outcomes)
    return found.pop() if len(found) == 1 else Outcome.UNKNOWN


def binomial(hits: int, of: int, confidence: float = CONFIDENCE) -> Interval:
    """Return a share with its exact interval (Clopper and Pearson 1934); NaN of nothing."""
    if not of:
        return Interval(math.nan, math.nan, math.nan)
    tail = (1 - confidence) / 2
    low = float(betaincinv(hits, of - hits + 1, tail)) if hits else 0.0
    high = float(betaincinv(hits + 1, of - hits, 1 - tail)) if hits < of else 1.0
    return Interval(hits / of, low, high)


def enough(share: float, confidence: float = CONFIDENCE) -> int:
    """Return how many requests must all be in time to show that a share is: share**n ≤ (1 − confidence) / 2."""
    return math.ceil(math.log((1 - confidence) / 2) / math.log(share))


def ratio_of_shares(ours: Interval, theirs: Interval) -> Interval:
    """Return the ratio of two shares with an interval from theirs (MOVER-R: Donner and Zou 2012, Newcombe 2016).

    With exact intervals it keeps at least about their confidence, and where all of the others are in time it is the
    exact interval of ours. NaN if theirs is 0.
    """
    if not theirs.value > 0:
        return Interval(math.nan, math.nan, math.nan, "theirs is 0")
    low = _mover(ours.value, theirs.value, ours.low, theirs.high, -1)
    high = _mover(ours.value, theirs.value, ours.high, theirs.low, 1) if theirs.low > 0 else math.inf
    return Interval(ours.value / theirs.value, max(0.0, low), high, "theirs may be 0" if math.isinf(high) else "")


def _mover(ours: float, theirs: float, our_end: float, their_end: float, sign: int) -> float:
    """Return one end of the ratio's interval: the lower one with the sign −1, the upper one with 1."""
    product = ours * theirs
    divisor = their_end * (2 * theirs - their_end)
    if abs(divisor) < 1e-12:
        return math.inf if sign > 0 else our_end * (2 * ours - our_end) / max(2 * product, 1e-12)
    root = math.sqrt(max(0.0, product**2 - our_end * (2 * ours - our_end) * divisor))
    return (product + sign * root) / divisor


def paired(pairs: Sequence[tuple[float, float]], confidence: float = CONFIDENCE) -> Interval:
    """Return the ratio ours / theirs over rounds: exp(mean log ratio ± t · s / √n), of the geometric mean.

    A round without a ratio, because theirs is 0 or one of the two is infinite, is not left out: there is no estimate
    then, and the note says in how many rounds. If ours is 0 in a round, mean and interval are those of the ratios.
    """
    lost = sum(not (math.isfinite(ours) and 0 < theirs < math.inf) for ours, theirs in pairs)
    if lost or not pairs:
        note = f"no ratio in {lost} of {len(pairs)} rounds" if lost else ""
        return Interval(math.nan, math.nan, math.nan, note)
    return mean_ratio([ours / theirs for ours, theirs in pairs], confidence)


def mean_ratio(ratios: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Return the geometric mean of ratios with its t interval; the plain mean if one of them is 0."""
    plain = min(ratios) <= 0
    numbers = np.array(ratios) if plain else np.log(ratios)
    middle = float(np.mean(numbers))
    if len(ratios) == 1:
        return Interval(ratios[0], 0.0, math.inf, "one round, no interval")
    t = float(stdtrit(len(ratios) - 1, (1 + confidence) / 2))
    half = t * float(np.std(numbers, ddof=1)) / math.sqrt(len(ratios))
    ends = (middle, middle - half, middle + half)
    value, low, high = (max(0.0, end) if plain else math.exp(end) for end in ends)
    return Interval(value, low, high)


def resampled(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], q: float) -> Interval:
    """Return the ratio ours / theirs of a quantile of all numbers, with an interval by bootstrap over pairs of blocks.

    `ours[k]` and `theirs[k]` are the numbers of block k, measured one after the other: they share what the machine was
    like then, which single numbers would hide. 1000 draws, always the same ones.
    """
    rng = np.random.default_rng(0)

    def ratio(blocks: npt.NDArray[np.int64]) -> float:
        over, under = (np.concatenate([side[block] for block in blocks]) for side in (ours, theirs))
        return float(np.quantile(over, q) / np.quantile(under, q))

    draws = [ratio(rng.integers(len(ours), size=len(ours))) for _ in range(1000)]
    low, high = np.quantile(draws, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return Interval(ratio(np.arange(len(ours))), float(low), float(high))
