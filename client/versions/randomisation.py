"""`more_often`, `slower`: test whether a version serves its users worse. Users are the unit, not their requests.

A hash draws the users whom a version answers. So if the version made no difference, any other draw of as many users
would have been as likely, and a test counts how many of them differ as much as the real one (randomisation test:
Fisher, The Design of Experiments, 1935). The real one is counted too, which makes the result exact however many draws
are taken (Phipson and Smyth, Statistical Applications in Genetics and Molecular Biology 9, 2010). Nothing is assumed of
how much one user's requests resemble each other, and nothing of how the load changes, as both sides meet the same load.

Latencies are compared as each user's mean of logarithms, relative to his own with the incumbent before, as far as that
foretells them (regression over all users, as in Quade, JASA 1967). They enter as normal scores (van der Waerden), so a
few slow ones do not decide, and with the square root of their number, as a mean of many is the more certain one.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri
from scipy.stats import rankdata

SEED = 0
"""Of the draws, so that a comparison can be repeated."""
PRECISION = 10
"""Number of draws that differ as much as the real one, on average, where the answer is just at the limit."""
FIRST_DRAWS = 64
"""Most comparisons are decided after so many; then four times as many are taken."""
BATCH_NUMBERS = 1 << 20
"""Random numbers that are in memory at a time."""

Vector = NDArray[np.float64]
Share = tuple[int, int]
"""Bad ones, and all."""
Wait = tuple[float, int, float | None]
"""A user's mean logarithm of seconds, the number of streams, and the mean before, None where there was none."""


def more_often(candidate: Sequence[Share], incumbent: Sequence[Share], alpha: float) -> bool:
    """Return whether the candidate's share of bad ones is higher, with a probability of a false alarm below `alpha`.

    Each side has one share per user; users without any have no say.
    """
    users = np.array([*candidate, *incumbent], dtype=np.float64).reshape(-1, 2)
    ours = np.arange(len(users)) < len(candidate)
    users, ours = users[users[:, 1] > 0], ours[users[:, 1] > 0]
    bad, total = users.T
    if not bad[ours].sum() or ours.all():
        return False
    return _is_rare(bad - bad.sum() / total.sum() * total, ours, alpha)


def slower(candidate: Sequence[Wait], incumbent: Sequence[Wait], ratio: float, alpha: float) -> bool:
    """Return whether the candidate's users wait over `ratio` times as long; see `more_often`."""
    if not candidate or not incumbent:
        return False
    users = np.array([*candidate, *incumbent], dtype=np.float64)  # None becomes nan
    ours = np.arange(len(users)) < len(candidate)
    mean, streams, before = users.T
    mean = mean - math.log(ratio) * ours
    known = ~np.isnan(before)
    if known.sum() > 2 and np.ptp(before[known]) > 0:
        centred = before[known] - before[known].mean()
        mean[known] -= centred * (centred @ mean[known]) / (centred @ centred)
    scores = ndtri(rankdata(mean) / (len(mean) + 1))
    return _is_rare(np.sqrt(streams) * (scores - np.average(scores, weights=np.sqrt(streams))), ours, alpha)


def _is_rare(scores: Vector, ours: NDArray[np.bool_], alpha: float) -> bool:
    """Return whether fewer than `alpha` of all draws of as many users have as high a sum of scores."""
    count, observed = int(ours.sum()), float(scores[ours].sum())
    if observed <= 0:
        return False
    if 2 * count > len(scores):  # the others are fewer, and their sum is what is missing from the total
        count, scores = len(scores) - count, -scores
        observed = observed + float(scores.sum())
    least = observed - 1e-9 * float(np.abs(scores).sum())
    draws = math.ceil(PRECISION / alpha)
    allowed = alpha * (draws + 1)
    generator, seen, as_high, batch = np.random.default_rng(SEED), 0, 1, FIRST_DRAWS
    while seen < draws and as_high < allowed:
        size = min(batch, draws - seen, max(1, BATCH_NUMBERS // len(scores)))
        drawn = generator.random((size, len(scores))).argpartition(count - 1, axis=1)[:, :count]
        as_high += int((scores[drawn].sum(axis=1) >= least).sum())
        seen, batch = seen + size, 4 * batch
    return as_high < allowed
