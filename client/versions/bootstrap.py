"""`mean_difference`, `share_difference`: how far two versions are apart on the same examples, and how surely.

Clusters of examples are resampled, not examples: what is asked twice, or by one user, is one piece of evidence (Davison
& Hinkley, Bootstrap Methods and their Application, 1997, section 3.8). A difference of losses is a ratio of two sums,
over clusters, of nats and of tokens. It is studentised, because single texts differ by much and in one direction: most
a little better, few much worse is what forgetting looks like (Hall, Annals of Statistics 16, 1988; Efron & Tibshirani,
An Introduction to the Bootstrap, 1993, chapter 12).

Two things remain that a bootstrap cannot know, as it draws only what was seen. The worst cases are rare, so a sample of
a skewed distribution mostly looks less skewed than that is, and too sure of the side away from its tail: there the
interval is widened (`widening`). And it is never narrower than Student's.

A share of exact matches has few distinct values: its resamples are taken as they are, and a drop must also be larger
than one that comes of exchanging the two versions at random.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy.special import stdtr, stdtrit

from serving.scores import effective_size

RESAMPLES = 2000
"""Bootstrap samples per difference."""
SEED = 0
"""Fixed, so that the same evidence gives the same verdict, also after a restart."""
MOST_CLUSTERS = 500
"""Number of clusters from which on several are resampled together, which costs no confidence and saves memory."""
TAIL = 50
"""Number of the most extreme resamples by which what lies beyond them is judged."""
ROUNDING = 1e-9
"""Smallest relative spread that is not taken for rounding."""
MOST_COUNTED = 100_000
"""Number of clusters from which on nobody asks how many would be enough."""
LEAST_ERROR = 0.1
"""Least standard error of a resample, as a share of that of the examples: few clusters may all be drawn alike."""
SKEWED = 3.0
"""Skewness, times √clusters, up to which differences count as even; normal ones are above it once in nine samples."""
WIDENING = 18.0
"""Times the skewness beyond that, / clusters: by how much an interval is widened. By simulation: promotions by luck are
at most 1.5 × as frequent as they may be at 30, 64 and 200 clusters, up to a lognormal distribution of σ = 1."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """The candidate's figure minus the incumbent's."""

    value: float
    low: float
    high: float
    """Ends of the interval at the confidence that was asked for."""
    p_lower: float
    """One-sided p-value: how often a difference that is not below 0 would look as low as this one."""
    p_higher: float
    """The same for a difference that is not above 0."""
    clusters: int = 0
    counts_as: float = 0.0
    """Clusters of equal length that would tell as much."""
    skewness: float = 0.0
    """Skewness of the clusters' differences per token: above 0 where few are much worse, the others a little better."""

    @property
    def widened(self) -> float:
        """Return the factor by which skewness widens the interval above `value`."""
        return widening(self.skewness, self.counts_as)

    def enough(self, factor: float) -> int:
        """Return how many clusters would be enough to find this difference below 0, if it stays as skewed.

        `factor`: by how much the difference has to exceed its half interval.
        """
        clusters, far = max(self.clusters, 1), factor * (self.high - self.value)
        while clusters < MOST_COUNTED:
            more = clusters / max(self.clusters, 1)
            if far * widening(self.skewness, more * self.counts_as) / self.widened <= -self.value * math.sqrt(more):
                break
            clusters = math.ceil(1.02 * clusters)
        return clusters

    def __str__(self) -> str:
        value, low, high = (f"{round(number, 4) + 0.0:+.4f}" for number in (self.value, self.low, self.high))  # no -0
        return f"{value} ({low} to {high})"


@dataclass(frozen=True)
class _Resampled:
    """Resampled values, in ascending order."""

    values: Floats

    def share_below(self, value: float) -> float:
        """Return the share of resamples up to `value`: of an exponential tail where fewer than `TAIL` are.

        An exponential tail is a generalised Pareto one of shape 0 (Knijnenburg et al., Bioinformatics 25, 2009), and
        longer than that of a normal distribution: it errs on the side of "cannot tell".
        """
        found = int(np.searchsorted(self.values, value, side="right"))
        if found >= TAIL:
            return found / len(self.values)
        edge, mean = self._tail()
        return TAIL / len(self.values) * (math.exp((value - edge) / mean) if mean else 0.0)

    def quantile(self, share: float) -> float:
        """Return the value below which a share of the resamples lies; the inverse of `share_below`."""
        if share * len(self.values) >= TAIL:
            return float(np.quantile(self.values, share))
        edge, mean = self._tail()
        return edge - mean * math.log(TAIL / len(self.values) / share)

    def _tail(self) -> tuple[float, float]:
        """Return where the tail begins, and the mean distance of its resamples from there."""
        edge = float(self.values[TAIL - 1])
        return edge, edge - float(self.values[:TAIL].mean())

    @property
    def mirrored(self) -> "_Resampled":
        return _Resampled(-self.values[::-1])


def widening(skewness: float, clusters: float) -> float:
    """Return by how much an interval is widened on the side of a tail that few clusters show a part of only.

    The skewness is of differences per token, and `clusters` of those of equal length that would tell as much: a long
    answer counts for more, but is no more skewed for it.
    """
    return 1 + WIDENING * max(0.0, skewness - SKEWED / math.sqrt(clusters)) / clusters if clusters else 1.0


def mean_difference(nats: Floats, tokens: Floats, scale: float, alpha: float) -> Difference:
    """Return the difference of two losses per token, with its studentised bootstrap interval.

    `nats` [clusters] are the differences of summed losses, `tokens` [clusters] what they are sums over, `scale` is a
    loss per token to measure rounding by; the interval leaves out `alpha` on each side. One cluster tells nothing.
    """
    nats, tokens = _at_most(nats, tokens)
    if len(nats) < 2:
        return Difference(float(nats.sum() / tokens.sum()), -math.inf, math.inf, 1.0, 1.0)
    drawn = _counts(len(nats)) @ np.column_stack((nats, tokens, nats * nats, nats * tokens, tokens * tokens))
    smallest = ROUNDING * abs(scale) + float(np.finfo(np.float64).tiny)
    sums = np.array((nats.sum(), tokens.sum(), nats @ nats, nats @ tokens, tokens @ tokens))
    (value,), (error,) = _ratio(sums[None], len(nats), smallest)
    values, errors = _ratio(drawn, len(nats), max(smallest, LEAST_ERROR * float(error)))
    resampled, skewness = _Resampled(np.sort((values - value) / errors)), _skewness(nats / tokens)
    counts_as = effective_size(tokens)
    above, below = (_OneSide(side, len(nats) - 1, widening(skew, counts_as))
                    for side, skew in ((resampled, skewness), (resampled.mirrored, -skewness)))  # fmt: skip
    size, distance = float(error), float(value / error)
    return Difference(
        value=float(value),
        low=float(value) + below.quantile(alpha) * size,
        high=float(value) - above.quantile(alpha) * size,
        p_lower=above.share_below(distance),
        p_higher=below.share_below(-distance),
        clusters=len(nats),
        counts_as=counts_as,
        skewness=skewness,
    )


@dataclass(frozen=True)
class _OneSide:
    """The lower tail of a studentised difference: resamples, widened, and at least as long as Student's."""

    resampled: _Resampled
    freedom: int
    widening: float

    def share_below(self, value: float) -> float:
        """Return the share up to `value`, the p-value of one that is below 0."""
        return max(self.resampled.share_below(value / self.widening), float(stdtr(self.freedom, value)))

    def quantile(self, share: float) -> float:
        """Return the value below which a share lies; the inverse of `share_below`."""
        return min(self.resampled.quantile(share) * self.widening, float(stdtrit(self.freedom, share)))


def _skewness(values: Floats) -> float:
    """Return the skewness of values around their mean; 0 where they are all alike."""
    away = values - values.mean()
    spread = float(away @ away) / len(away)
    return float((away**3).mean()) / spread**1.5 if spread > 0 else 0.0


def _ratio(sums: Floats, clusters: int, smallest: float) -> tuple[Floats, Floats]:
    """Return the ratios of sums, and their standard errors by linearisation: sqrt(n / (n − 1) Σ(d − θ t)²) / Σt."""
    d, t, dd, dt, tt = sums.T
    ratio = d / t
    squares = np.maximum(dd - 2 * ratio * dt + ratio * ratio * tt, 0)
    return ratio, np.maximum(np.sqrt(clusters / (clusters - 1) * squares) / t, smallest)


def share_difference(gained: Floats, examples: Floats, allowed: float, alpha: float) -> Difference:
    """Return the difference of two shares, with its percentile bootstrap interval.

    `gained` [clusters] are matches gained less those lost, `examples` [clusters] the examples of each; `p_lower` is of
    a drop by more than `allowed`.
    """
    by_chance = _exchanged(gained)
    gained, examples = _at_most(gained, examples)
    drawn = _counts(len(gained)) @ np.column_stack((gained, examples))
    resampled = _Resampled(np.sort(drawn[:, 0] / drawn[:, 1]))
    return Difference(
        value=float(gained.sum() / examples.sum()),
        low=resampled.quantile(alpha),
        high=-resampled.mirrored.quantile(alpha),
        p_lower=max(resampled.mirrored.share_below(allowed), by_chance),
        p_higher=resampled.share_below(0.0),
    )


def _exchanged(gained: Floats) -> float:
    """Return the probability of so few matches gained if each cluster's gain were its loss with probability ½.

    Of clusters that gain or lose one this is McNemar's exact test (Psychometrika 12, 1947).
    """
    sizes = np.abs(gained[gained != 0]).astype(np.int64)
    chances = np.ones(1)  # of each sum, from −Σ|gained| on
    for size in sizes:
        apart = np.zeros(2 * size)
        chances = (np.concatenate((chances, apart)) + np.concatenate((apart, chances))) / 2
    return float(chances[: int(gained.sum() + sizes.sum()) + 1].sum())


def _at_most(*columns: Floats) -> tuple[Floats, ...]:
    """Sum clusters together until there are no more than `MOST_CLUSTERS`: sums of independent ones are independent."""
    group = np.arange(len(columns[0])) % MOST_CLUSTERS
    return tuple(np.bincount(group, column).astype(np.float64) for column in columns)


@lru_cache(maxsize=2)
def _counts(clusters: int) -> Floats:
    """Return [RESAMPLES, clusters]: how often each cluster is in each resample."""
    drawn = np.random.default_rng(SEED).multinomial(clusters, np.full(clusters, 1 / clusters), RESAMPLES)
    return drawn.astype(np.float64)
