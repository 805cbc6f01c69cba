"""`Looks`: decide when traffic is tested, and what probability of a false alarm each test may have.

Traffic is tested repeatedly while it comes in, and repeated tests raise the probability of a false alarm. So looks are
taken at doubled numbers of requests, and their probabilities add up to α (a Bonferroni bound over the looks).

A watch has a horizon, `min_requests`. At the time t = seen / horizon, α t² may be spent in all, and the k-th look gets
α (t_k² - t_{k-1}²): little while few requests can show little, and the last look all that is left (Lan and DeMets,
Biometrika 1983; the power family of Kim and DeMets, Biometrika 1987, with ρ = 2). The bound holds because the times of
the looks do not depend on what is compared: requests are counted, no errors and no ratings. No look is taken at a
smaller t than `FIRST_TIME`, where nothing could be told with the probability that it may have.

A roll-back window has none, so the k-th look gets 6 α / (π² k²), whose sum over all k is α.
"""

import math

FIRST_LOOK = 8
"""Number of requests before the first look."""
FIRST_TIME = 1 / 16
"""Part of the horizon before the first look: the smallest probability of a false alarm is α / 256."""
RHO = 2
"""Exponent of the spending function."""


class Looks:
    """Decides when to test the traffic, and gives each test its share of the probability of a false alarm.

    `horizon` is the number of requests after which the last look may be taken; None: there is no last one.
    """

    def __init__(self, confidence: float, horizon: int | None = None) -> None:
        self._alpha = (1 - confidence) / 2  # of the two-sided interval, as all of [shadow] is read
        self._horizon = horizon
        self._next = max(FIRST_LOOK, math.ceil(FIRST_TIME * (horizon or 0)))
        self._taken = 0
        self._spent = 0.0

    def due(self, seen: int) -> bool:
        """Return True when `seen` requests are enough for the next look that is not the last."""
        return seen >= self._next and (self._horizon is None or seen < self._horizon)

    def spend(self, seen: int, *, last: bool = False) -> float:
        """Take a look after `seen` requests; return the probability of a false alarm it may have."""
        while self._next <= seen:
            self._next *= 2
        self._taken += 1
        if last:
            total = self._alpha
        elif self._horizon is None:
            total = self._spent + self._alpha * 6 / (math.pi * self._taken) ** 2
        else:
            total = self._alpha * min(1.0, seen / self._horizon) ** RHO
        alpha, self._spent = total - self._spent, total
        return alpha
