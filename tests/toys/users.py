"""`Requests`: simulated requests of a site's users, to learn how often a comparison of two versions errs."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from client.versions.looks import Looks
from client.versions.traffic_comparison import compare
from serving.traffic_report import UserTraffic, VersionTraffic
from umbel.site.sections import ShadowSection

CONFIDENCE = 0.95
NOMINAL = (1 - CONFIDENCE) / 2
"""Probability of a false alarm that each test may have, over all looks together."""
Numbers = NDArray[np.float64]


class User(NamedTuple):
    """A `UserTraffic` that takes a tenth of the time to make: a simulation makes a million."""

    requests: int
    errors: int
    up: int
    down: int
    streams: int
    log_ttft: float
    paced: int = 0
    log_tpot: float = 0.0


@dataclass(frozen=True)
class Requests:
    """Streams of some users in the order in which they came, and what each of them got."""

    users: NDArray[np.int64]
    log_ttft: Numbers
    failed: NDArray[np.bool_]
    rated: NDArray[np.bool_]
    bad: NDArray[np.bool_]
    """Rated bad."""

    def of(self, chosen: NDArray[np.bool_]) -> "Requests":
        """Return some of the requests."""
        return replace(self, **{name: value[chosen] for name, value in vars(self).items()})

    def traffic(self, first: int) -> VersionTraffic:
        """Return what the router counts of the first requests."""
        names, place = np.unique(self.users[:first], return_inverse=True)
        total, failed, rated, bad, waited = (
            np.bincount(place, weights, len(names)).tolist()
            for weights in (None, *(self.failed[:first], self.rated[:first], self.bad[:first], self.log_ttft[:first]))
        )
        by_user = {
            code: cast(UserTraffic, User(
                int(total[i]), int(failed[i]), int(rated[i] - bad[i]), int(bad[i]), int(total[i]), waited[i]
            ))
            for i, code in enumerate(names.tolist())
        }  # fmt: skip
        return VersionTraffic.model_construct(requests=first, users=len(names), by_user=by_user)


def requests(
    generator: np.random.Generator, users: NDArray[np.int64], log_ttft: Numbers, failed: float | Numbers = 0.0,
    bad: float = 0.1, rated: float = 0.0,
) -> Requests:  # fmt: skip
    """Return requests that fail, are rated, and then rated bad, with these probabilities."""
    number = len(users)
    told = generator.random(number) < rated
    return Requests(
        users, log_ttft, generator.random(number) < failed, told, told & (generator.random(number) < bad)
    )  # fmt: skip


def alarmed(
    new: Requests, now: Requests, looks: Iterator[tuple[int, int, float]], policy: ShadowSection,
    before: VersionTraffic | None = None, what: str = "",
) -> bool:  # fmt: skip
    """Return whether a look calls the new version worse, at (new requests, others meanwhile, alpha).

    With `what`, only by the comparison whose reason begins with it.
    """
    for seen, seen_now, alpha in looks:
        found = compare(
            new.traffic(seen), now.traffic(seen_now), "live", policy, alpha, None, before or VersionTraffic()
        )
        if found.worse and any(what in reason for reason in found.reasons if "with confidence" in reason):
            return True
    return False


def looks_of_a_watch(new: int, others: int) -> Iterator[tuple[int, int, float]]:
    """Yield the looks of a watch of `new` requests, while `others` answer so many more."""
    looks = Looks(CONFIDENCE, new)
    for seen in range(1, new + 1):
        if looks.due(seen) or seen == new:
            yield seen, others * seen, looks.spend(seen, last=seen == new)


def looks_after_a_promotion(is_new: NDArray[np.bool_]) -> Iterator[tuple[int, int, float]]:
    """Yield the looks while requests come, each to the new version or to the one before."""
    looks = Looks(CONFIDENCE)
    new, others = np.cumsum(is_new), np.cumsum(~is_new)
    for seen, seen_now in zip(new.tolist(), others.tolist(), strict=True):
        if looks.due(min(seen, seen_now)):
            yield seen, seen_now, looks.spend(min(seen, seen_now))


def load(generator: np.random.Generator, number: int, sd: float, constant: float) -> Numbers:
    """Return the logarithm of a site's load at each request: AR(1), with a time constant in requests."""
    keep = np.exp(-1 / constant)
    steps = generator.normal(0, sd * np.sqrt(1 - keep**2), number)
    found = np.empty(number)
    last = generator.normal(0, sd)
    for i in range(number):
        found[i] = last = keep * last + steps[i]
    return found
