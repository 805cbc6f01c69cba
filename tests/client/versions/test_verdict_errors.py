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
    [(normal, 0.0), (normal, 1.0), (skewed(1), 0.0), (skewed(2), 0.0), (skewed(4), 0.0)],
    ids=["normal", "answers of very different length", "skewness 1", "skewness 2", "skewness 4"],
)  # fmt: skip
def test_a_version_that_is_as_good_is_seldom_promoted_or_rejected(count: int, draw: Draw, lengths: float) -> None:
    promoted, rejected = rates(lambda g: Probe(one(g, count, draw, lengths=lengths), {}), POLICY)
    assert promoted <= bound(Look().level(ALPHA))
    assert rejected <= bound(ALPHA)


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("draw", [normal, skewed(1)], ids=["normal", "skewness 1"])
def test_a_gain_of_four_standard_errors_is_found_and_a_loss_is_as_well(count: int, draw: Draw) -> None:
    gain = 0.4 / np.sqrt(count)
    assert rates(lambda g: Probe(one(g, count, draw, gain), {}), POLICY, 100)[0] >= 0.85
    assert rates(lambda g: Probe(one(g, count, draw, -gain), {}), POLICY, 100)[1] >= 0.85


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

    assert rates(probe, policy)[1] <= bound(ALPHA)
    assert rates(lambda g: probe(g, gain=0.05), policy, 100)[0] >= 0.9, "five harmless guards block no gain"
    assert rates(lambda g: probe(g, gain=0.05, harm=0.06), policy, 100)[1] >= 0.9, "one that is broken does"


def promotions(generator: np.random.Generator, count: int, gain: float, rounds: int, spent: bool) -> list[bool]:
    """Rounds on the same examples: each version is `gain` better than what answers, and is measured with noise."""
    kept, number, since, tokens = np.full(count, 4.0), 0, 0, np.full(count, TOKENS, np.int32)
    wrong, found = np.zeros(count, np.bool_), []
    for _ in range(rounds):
        number, since = number + 1, since + 1
        new = kept + normal(generator, count) - gain
        roles = {role: Scores(loss * TOKENS, tokens, wrong) for role, loss in (("base", kept), ("shadow", new))}
        verdict = judge(Probe(roles, {}), POLICY, Look(number, since) if spent else None)
        found.append(verdict.accepted)
        kept, since = (new, 0) if verdict.accepted else (kept, since)
    return found


@pytest.mark.parametrize("count", SIZES)
def test_fifty_rounds_by_the_same_examples_promote_by_luck_as_seldom_as_one(count: int) -> None:
    generator, runs = np.random.default_rng(21), 100
    lucky = sum(any(promotions(generator, count, 0.0, 50, spent=True)) for _ in range(runs))
    assert lucky / runs <= bound(ALPHA, runs)
    uncounted = sum(any(promotions(generator, count, 0.0, 50, spent=False)) for _ in range(20))
    assert uncounted > 20 * 0.2, "it is the counting that does it"


@pytest.mark.parametrize(("errors", "least"), [(3.0, 0.55), (4.0, 0.9), (5.0, 0.97)])
def test_fifty_rounds_with_real_gains_are_promoted_all_along(errors: float, least: float) -> None:
    """A promotion restores what may be spent. `errors`: the gain of a round in standard errors of its measurement."""
    generator = np.random.default_rng(22)
    runs = np.array([promotions(generator, 64, errors * 0.1 / 8, 50, spent=True) for _ in range(20)])
    assert runs.mean() >= least
    assert runs[:, -25:].mean() >= least - 0.1, "the later rounds as well"
    assert runs[:, :3].any(axis=1).mean() >= 0.9, "and of three rounds one at least"
