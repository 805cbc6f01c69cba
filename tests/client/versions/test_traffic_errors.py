"""How often a comparison of two versions by users' traffic errs, simulated with the functions that a site uses.

A false alarm may have 2.5 %, and half as much again is allowed here. The shares have a Monte-Carlo error (one standard
error) of 0.012 for 160 runs where 2.5 % are expected, and of 0.035 for 200 runs where half are; seeds are fixed.
"""

from typing import Any

import numpy as np
import pytest

from tests.toys.users import (
    NOMINAL,
    Requests,
    alarmed,
    load,
    looks_after_a_promotion,
    looks_of_a_watch,
    requests,
)
from umbel.site.sections import ShadowSection

MOST = 1.5 * NOMINAL
NEW, OTHERS = 100, 9
"""Requests that a watched shadow answers, and those of the incumbent for each of them."""
POLICY = ShadowSection(watch_s=60, canary_share=0.1, rollback_window_s=600)
ANY_NUMBER = POLICY.model_copy(update={"min_users": 1})


class Site:
    """Users with habits: each has prompts of his own length, and a probability of his own that a request fails."""

    def __init__(self, generator: np.random.Generator, users: int, sd: float, clumped: float = 0.0) -> None:
        self.generator = generator
        self.habits = generator.normal(0, sd, users)
        self.fails = generator.beta(0.05 / clumped, 0.95 / clumped, users) if clumped else 0.0 * self.habits

    def sides(self) -> tuple[Any, Any]:
        """Draw one user in ten for the canary; return them and the others."""
        drawn = self.generator.permutation(len(self.habits))
        canary = max(1, len(drawn) // 10)
        return drawn[:canary], drawn[canary:]

    def asks(self, users: Any, number: int, slow: float = 1.0, noise: float = 0.5, failed: float = 0.0, **more: float
             ) -> Requests:  # fmt: skip
        chosen = self.generator.choice(users, number)
        waits = self.habits[chosen] + np.log(slow) + self.generator.normal(0, noise, number)
        return requests(self.generator, chosen, waits, self.fails[chosen] + failed, **more)

    def watch(self, policy: ShadowSection, sides: tuple[Any, Any], before: int = 0, what: str = "", slow: float = 1.0,
              now: dict[str, float] | None = None, **new: float) -> bool:  # fmt: skip
        """Return whether a watch calls a version worse; each user had about `before` requests before."""
        everybody = np.arange(len(self.habits))
        earlier = self.asks(everybody, before * len(everybody))
        return alarmed(
            self.asks(sides[0], NEW, slow, **new), self.asks(sides[1], NEW * OTHERS, **(now or {})),
            looks_of_a_watch(NEW, OTHERS), policy, earlier.traffic(len(earlier.users)) if before else None, what,
        )  # fmt: skip


def share(runs: int, users: int, sd: float, clumped: float = 0.0, seed: int = 0, **watch: Any) -> float:
    """Return how many of `runs` sites call a version worse."""
    generator, policy, found = np.random.default_rng(seed), watch.pop("policy", POLICY), 0
    for _ in range(runs):
        site = Site(generator, users, sd, clumped)
        found += site.watch(policy, site.sides(), **watch)
    return found / runs


@pytest.mark.parametrize("sd", [0.5, 0.8])
@pytest.mark.parametrize("users", [10, 20, 100])
@pytest.mark.parametrize("policy", [POLICY, ANY_NUMBER])
def test_a_version_that_is_no_slower_is_not_rejected_for_who_its_users_are(
    users: int, sd: float, policy: ShadowSection
) -> None:
    assert share(60, users, sd, policy=policy) <= MOST


@pytest.mark.parametrize("before", [0, 5])
@pytest.mark.parametrize(("users", "sd"), [(50, 0.5), (100, 0.8), (300, 0.8)])
def test_a_version_that_is_just_as_slow_as_allowed_is_rejected_as_rarely_as_promised(
    users: int, sd: float, before: int
) -> None:
    assert share(200, users, sd, policy=ANY_NUMBER, slow=1.5, before=before) <= MOST


def test_no_site_rejects_one_good_version_after_the_other() -> None:
    generator = np.random.default_rng(1)
    rejected = np.zeros(5)
    for _ in range(60):
        site = Site(generator, 30, 0.8)
        sides = site.sides()  # the same users go first with every version
        versions = [site.watch(ANY_NUMBER, sides, before=5, slow=1.5) for _ in rejected]
        rejected[: sum(versions)] += 1
    assert rejected[0] / 60 <= 5 * MOST
    assert rejected[-1] == 0


@pytest.mark.parametrize("policy", [POLICY, ANY_NUMBER])
def test_users_whose_requests_fail_with_any_version_are_no_evidence(policy: ShadowSection) -> None:
    for users in (20, 200):
        assert share(200, users, 0.0, clumped=0.5, before=5, policy=policy, what="errors") <= MOST


@pytest.mark.parametrize(("alike", "what"), [({"failed": 0.01}, "errors"), ({"rated": 0.2, "bad": 0.1}, "bad ratings")])
def test_versions_that_are_alike_are_told_apart_as_rarely_as_promised(alike: dict[str, float], what: str) -> None:
    assert share(200, 300, 0.0, now=alike, what=what, **alike) <= MOST


@pytest.mark.parametrize(
    ("new", "now", "what", "least"),
    [
        ({"failed": 0.05}, {"failed": 0.01}, "errors", 0.58),
        ({"failed": 0.08}, {"failed": 0.01}, "errors", 0.91),
        ({"rated": 0.2, "bad": 0.3}, {"rated": 0.2, "bad": 0.1}, "bad ratings", 0.46),
        ({"slow": 1.8}, {}, "first token", 0.89),
    ],
    ids=["five times the errors", "eight times the errors", "bad ratings", "1.8 times as slow"],
)
def test_a_version_that_is_worse_is_found_within_a_watch(
    new: dict[str, float], now: dict[str, float], what: str, least: float
) -> None:
    assert share(200, 300, 0.0, now=now, what=what, **new) >= least


def promoted(generator: np.random.Generator, sd: float, constant: float, slow: float, failed: float = 0.0) -> bool:
    """Return whether 900 requests after a promotion call it back; a tenth of 200 users stay with the one before."""
    number, users = 900, 200
    control = generator.permutation(users) < users // 10
    asked = generator.integers(users, size=number)
    is_new = ~control[asked]
    waits = load(generator, number, sd, constant) + np.log(slow) * is_new + generator.normal(0, 0.3, number)
    came = requests(generator, asked, waits, 0.01 + failed * is_new)
    what = "errors" if failed else "first token"
    return alarmed(came.of(is_new), came.of(~is_new), looks_after_a_promotion(is_new), ANY_NUMBER, what=what)


@pytest.mark.parametrize("constant", [30, 120, 600])
@pytest.mark.parametrize("sd", [0.4, 0.6])
def test_load_that_comes_and_goes_takes_no_version_back(sd: float, constant: float) -> None:
    generator = np.random.default_rng(2)
    assert sum(promoted(generator, sd, constant, slow=1.0) for _ in range(40)) / 40 <= MOST / 2
    assert sum(promoted(generator, sd, constant, slow=1.5) for _ in range(160)) / 160 <= MOST, "as slow as it may be"


@pytest.mark.parametrize(("slow", "failed"), [(2.0, 0.0), (1.0, 0.2)])
def test_a_version_that_serves_worse_is_taken_back_whatever_the_load(slow: float, failed: float) -> None:
    generator = np.random.default_rng(3)
    assert sum(promoted(generator, 0.4, 120, slow, failed) for _ in range(60)) / 60 >= 0.8
