"""How often a verdict errs, by simulation: about as often as the confidence says, whatever the examples are like.

Every rate is held against 1.5 × its nominal value and three standard errors of the simulation; each case also shows
that the rule finds what is there.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pytest

from client.heldout_looks import Look
from client.versions.verdict import Probe, judge
from serving.scores import Scores
from umbel.site.sections import ShadowSection

Floats = npt.NDArray[np.float64]
Draw = Callable[[np.random.Generator, int], Floats]
"""Makes differences per token, of mean 0 and standard deviation 0.1, for a number of clusters."""

ALPHA = 0.025
SIZES = (30, 64, 200)
REPEATS = 400
TOKENS = 20


def normal(generator: np.random.Generator, count: int) -> Floats:
    return generator.normal(0, 0.1, count)


def skewed(skewness: float) -> Draw:
    """Most a little better, few much worse, as forgetting looks: a gamma distribution."""
    shape = 4 / skewness**2
    return lambda generator, count: 0.1 * (generator.gamma(shape, 1, count) - shape) / np.sqrt(shape)


def lognormal(generator: np.random.Generator, count: int) -> Floats:
    """A skewness of 6.2, of which samples of this size show about 2."""
    mean, variance = np.exp(0.5), np.exp(2) - np.exp(1)
    return 0.1 * (generator.lognormal(0, 1, count) - mean) / np.sqrt(variance)


def heavy(generator: np.random.Generator, count: int) -> Floats:
    """Student's t of three degrees of freedom: now and then one that is far off, to either side."""
    return 0.1 * generator.standard_t(3, count) / np.sqrt(3)


def bound(nominal: float, repeats: int = REPEATS) -> float:
    limit = 1.5 * nominal
    return limit + 3 * float(np.sqrt(limit * (1 - limit) / repeats))


def pair(change: Floats, tokens: Floats, flips: Floats, clusters: Sequence[int] | None = None) -> dict[str, Scores]:
    """Scores of base and shadow: `change` is the difference per token, `flips` is -1, 0 or 1 match gained."""
    each, before = tokens.astype(np.int32), flips <= 0
    base = Scores(4.0 * tokens, each, before)
    shadow = Scores((4.0 + change) * tokens, each, before + flips > 0)
    return {role: scores.grouped(clusters) for role, scores in (("base", base), ("shadow", shadow))}


def one(generator: np.random.Generator, count: int, draw: Draw, gain: float = 0.0, copies: int = 1,
        lengths: float = 0.0, grouped: bool = True) -> dict[str, Scores]:  # fmt: skip
    """A set of `count` clusters of as many examples as `copies`, of which a tenth answer otherwise than before."""
    tokens = np.maximum(1, np.round(np.exp(generator.normal(np.log(TOKENS), lengths, count))))
    flips = generator.choice((-1, 0, 1), count, p=(0.05, 0.9, 0.05))
    clusters = np.repeat(np.arange(count), copies).tolist() if grouped else None
    columns = (np.repeat(column, copies) for column in (draw(generator, count) - gain, tokens, flips))
    return pair(*columns, clusters)


def rates(make: Callable[[np.random.Generator], Probe], policy: ShadowSection, repeats: int = REPEATS) -> Floats:
    """Return the shares of verdicts that promote and that reject."""
    generator = np.random.default_rng(20)
    decisions = [judge(make(generator), policy).decision for _ in range(repeats)]
    return np.array([decisions.count(which) / repeats for which in ("promote", "reject")])


POLICY = ShadowSection(min_examples=10)


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize(
    ("draw", "lengths"),
    [(normal, 0.0), (normal, 1.0), (skewed(1), 0.0), (skewed(4), 0.0), (lognormal, 0.0), (lognormal, 0.5),
     (heavy, 0.0)],
    ids=["normal", "answers of very different length", "skewness 1", "skewness 4", "lognormal", "both", "heavy tails"],
)  # fmt: skip
def test_a_version_that_is_as_good_is_seldom_promoted_or_rejected(count: int, draw: Draw, lengths: float) -> None:
    promoted, rejected = rates(lambda g: Probe(one(g, count, draw, lengths=lengths), {}), POLICY)
    assert promoted <= bound(Look().level(ALPHA))
    assert rejected <= bound(ALPHA)


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize(("draw", "least"), [(normal, 0.85), (skewed(1), 0.6)], ids=["normal", "skewness 1"])
def test_a_gain_of_four_standard_errors_is_found_and_a_loss_is_as_well(count: int, draw: Draw, least: float) -> None:
    """Of a gain by which few get much worse it asks for more; of a loss it does not."""
    gain = 0.4 / np.sqrt(count)
    assert rates(lambda g: Probe(one(g, count, draw, gain), {}), POLICY, 100)[0] >= least
    assert rates(lambda g: Probe(one(g, count, draw, -gain), {}), POLICY, 100)[1] >= 0.85


@pytest.mark.parametrize(("count", "least"), [(30, 0.65), (64, 0.7), (200, 0.72)])
def test_normal_differences_cost_no_power(count: int, least: float) -> None:
    """At three standard errors a test that knew the distribution, and did nothing about others, would find 80 %."""
    gain = 0.3 / np.sqrt(count)
    assert rates(lambda g: Probe(one(g, count, normal, gain), {}), POLICY, 200)[0] >= least


@pytest.mark.parametrize(("count", "copies"), [(30, 4), (64, 3), (30, 10)])
def test_copies_are_no_evidence(count: int, copies: int) -> None:
    promoted, rejected = rates(lambda g: Probe(one(g, count, normal, copies=copies), {}), POLICY)
    assert promoted <= bound(Look().level(ALPHA))
    assert rejected <= bound(ALPHA)
    ungrouped = rates(lambda g: Probe(one(g, count, normal, copies=copies, grouped=False), {}), POLICY, 100)
    assert ungrouped.sum() > 0.1, "it is the groups that do it"


def test_users_who_differ_among_each_other_are_no_more_evidence_than_they_are() -> None:
    """Forty users with five examples each, which share half of their variance."""

    def make(generator: np.random.Generator) -> Probe:
        users = np.repeat(np.arange(40), 5)
        change = np.sqrt(0.5) * (normal(generator, 40)[users] + normal(generator, 200))
        return Probe(pair(change, np.full(200, float(TOKENS)), np.zeros(200), users.tolist()), {})

    promoted, rejected = rates(make, POLICY)
    assert promoted <= bound(Look().level(ALPHA))
    assert rejected <= bound(ALPHA)


@pytest.mark.parametrize("guards", [1, 5])
def test_many_guards_reject_together_as_seldom_as_one_set(guards: int) -> None:
    names = [f"guard-{number}" for number in range(guards)]
    policy = ShadowSection(guard=[{"name": name, "data": "x.jsonl", "max_loss_ratio": 1.0} for name in names])

    def probe(generator: np.random.Generator, gain: float = 0.0, harm: float = 0.0) -> Probe:
        sets = {name: one(generator, 64, normal, -harm if name == names[0] else 0.0) for name in names}
        return Probe(one(generator, 64, normal, gain), sets)

    assert rates(probe, policy, 200)[1] <= bound(ALPHA, 200)
    assert rates(lambda g: probe(g, gain=0.05), policy, 100)[0] >= 0.9, "five harmless guards block no gain"
    assert rates(lambda g: probe(g, gain=0.05, harm=0.06), policy, 100)[1] >= 0.9, "one that is broken does"


def promotions(
    generator: np.random.Generator, count: int, gain: float, rounds: int, spent: bool, draw: Draw = normal
) -> list[bool]:
    """Rounds on the same examples: each version is `gain` better than what answers, and is measured with noise."""
    kept, number, since, tokens = np.full(count, 4.0), 0, 0, np.full(count, TOKENS, np.int32)
    wrong, found = np.zeros(count, np.bool_), []
    for _ in range(rounds):
        number, since = number + 1, since + 1
        change = draw(generator, count) - gain
        new = kept + change
        roles = {role: Scores(loss * TOKENS, tokens, wrong) for role, loss in (("base", kept), ("shadow", new))}
        accepted = is_perhaps_lower(change) and judge(
            Probe(roles, {}), POLICY, Look(number, since) if spent else None
        ).accepted  # fmt: skip
        found.append(accepted)
        kept, since = (new, 0) if accepted else (kept, since)
    return found


def is_perhaps_lower(change: Floats) -> bool:
    """Say whether there is anything to judge: no mean within two of its standard errors of 0 is promoted."""
    return bool(change.mean() < -2 * change.std(ddof=1) / np.sqrt(len(change)))


def test_what_is_within_two_standard_errors_is_never_promoted() -> None:
    generator, within = np.random.default_rng(23), 0
    for _ in range(300):
        change = normal(generator, 64) - 0.02
        if not is_perhaps_lower(change):
            within += 1
            assert judge(Probe(pair(change, np.full(64, TOKENS), np.zeros(64)), {}), POLICY).decision == "keep"
    assert within > 50


@pytest.mark.parametrize(
    ("count", "draw"),
    [*((count, normal) for count in SIZES), (30, skewed(4)), (200, skewed(4))],
    ids=["30", "64", "200", "30 of skewness 4", "200 of skewness 4"],
)
def test_fifty_rounds_by_the_same_examples_promote_by_luck_as_seldom_as_one(count: int, draw: Draw) -> None:
    generator, runs = np.random.default_rng(21), 200
    lucky = sum(any(promotions(generator, count, 0.0, 50, spent=True, draw=draw)) for _ in range(runs))
    assert lucky / runs <= bound(ALPHA, runs)


def test_without_the_count_fifty_rounds_often_promote_by_luck() -> None:
    generator = np.random.default_rng(21)
    assert sum(any(promotions(generator, 64, 0.0, 50, spent=False)) for _ in range(40)) > 40 * 0.3


@pytest.mark.parametrize(("errors", "least"), [(3.0, 0.55), (4.0, 0.9), (5.0, 0.97)])
def test_fifty_rounds_with_real_gains_are_promoted_all_along(errors: float, least: float) -> None:
    """A promotion restores what may be spent. `errors`: the gain of a round in standard errors of its measurement."""
    generator = np.random.default_rng(22)
    runs = np.array([promotions(generator, 64, errors * 0.1 / 8, 50, spent=True) for _ in range(20)])
    assert runs.mean() >= least
    assert runs[:, -25:].mean() >= least - 0.1, "the later rounds as well"
    assert runs[:, :3].any(axis=1).mean() >= 0.9, "and of three rounds one at least"
