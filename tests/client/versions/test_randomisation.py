"""Tests over users: exact for few of them, whatever one user's requests have in common, and not moved by a few."""

from itertools import combinations

import numpy as np
import pytest

from client.versions.randomisation import more_often, slower


def rarer_than(probability: float) -> tuple[float, float]:
    """Probabilities of a false alarm with which a test must find nothing, and something."""
    return 0.7 * probability, 1.5 * probability


def test_the_probability_is_that_of_all_draws_of_as_many_users() -> None:
    ours, others = [(3, 5), (2, 4)], [(0, 6), (1, 5), (0, 3), (2, 6), (0, 4), (0, 5), (1, 4)]
    users = np.array([*ours, *others], dtype=float)
    scores = users[:, 0] - users[:, 0].sum() / users[:, 1].sum() * users[:, 1]
    sums = [sum(scores[list(drawn)]) for drawn in combinations(range(len(users)), len(ours))]
    probability = np.mean([total >= scores[:2].sum() - 1e-9 for total in sums])
    never, surely = rarer_than(float(probability))
    assert (more_often(ours, others, never), more_often(ours, others, surely)) == (False, True)


@pytest.mark.parametrize(("few", "many"), [(2, 20), (20, 2)])
def test_either_side_may_be_the_smaller_one(few: int, many: int) -> None:
    ours, others = [(5, 5)] * few, [(0, 5)] * many
    never, surely = rarer_than(1 / (22 * 21 / 2))
    assert (more_often(ours, others, never), more_often(ours, others, surely)) == (False, True)


def test_one_user_is_one_however_many_requests_he_makes() -> None:
    assert not more_often([(1000, 1000)], [(0, 10)] * 30, 0.025)
    assert more_often([(1, 1)] * 3, [(0, 10)] * 30, 0.025)


@pytest.mark.parametrize(
    ("ours", "others"),
    [([], [(0, 5)]), ([(5, 5)], []), ([(0, 5)] * 9, [(5, 5)] * 90), ([(5, 5)] * 9, [(5, 5)] * 90),
     ([(0, 0)], [(1, 2)])],
)  # fmt: skip
def test_nothing_to_compare_and_nothing_worse_is_not_worse(
    ours: list[tuple[int, int]], others: list[tuple[int, int]]
) -> None:
    assert not more_often(ours, others, 0.025)


def test_users_are_compared_relative_to_what_they_had_before() -> None:
    """Three of four users of the candidate always wait long; it makes each of them wait 2.2 times as long."""
    generator = np.random.default_rng(0)
    habits = [*generator.normal(0, 1.0, 20), *generator.normal(0, 1.0, 180)]
    noise = generator.normal(0, 0.05, len(habits))
    after = np.add(habits, noise) + np.log(2.2) * (np.arange(len(habits)) < 20)
    told = [(mean, 5, habit) for mean, habit in zip(after, habits, strict=True)]
    blind = [(mean, 5, None) for mean in after]
    assert slower(told[:20], told[20:], 1.5, 1e-3)
    assert not slower(blind[:20], blind[20:], 1.5, 1e-3)
    assert not slower(told[:20], told[20:], 2.5, 0.5)


def test_a_few_very_slow_ones_do_not_decide() -> None:
    generator = np.random.default_rng(1)
    usual = [(mean, 5, None) for mean in generator.normal(0, 0.2, 200)]
    assert not slower([(9.0, 5, None)] * 2 + usual[:18], usual[20:], 1.5, 0.025)
    assert slower([(9.0, 5, None)] * 20, usual[20:], 1.5, 0.001)


def test_latencies_that_are_all_the_same_are_no_slower() -> None:
    same = [(-2.0, 5, -2.0)] * 30
    assert not slower(same, same, 1.0, 0.5)
    assert not slower([], same, 1.0, 0.5)
    assert not slower(same, [], 1.0, 0.5)
