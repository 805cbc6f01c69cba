"""Gains on the same examples: their bound holds as often as it says, and what is no number is no gain."""

import math

import numpy as np
import pytest

from client.worth.gain import CONFIDENCE, Gain


def test_the_bound_is_below_the_true_gain_as_often_as_it_says() -> None:
    true, below = 0.05, 0
    for seed in range(1000):
        generator = np.random.default_rng(seed)
        before = generator.gamma(2.0, 1.0, 20)
        below += Gain.between(before, before - true - 0.3 * generator.standard_normal(20)).lower <= true
    assert CONFIDENCE - 0.025 <= below / 1000 <= CONFIDENCE + 0.025


def test_what_differs_between_examples_and_not_in_time_costs_no_confidence() -> None:
    before = np.linspace(0.1, 9.0, 16)
    gain = Gain.between(before, before - 0.01)
    assert (gain.mean, gain.lower) == (pytest.approx(0.01), pytest.approx(0.01))


def test_examples_count_by_their_weights() -> None:
    before, after = np.array([1.0, 1.0, 5.0]), np.array([0.5, 0.7, 9.0])
    weighed = Gain.between(before, after, np.array([1.0, 1.0, 0.0]))
    assert weighed.mean == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("before", "after"), [([], []), ([1.0], [0.1]), ([1.0, math.nan], [0.5, 0.5]), ([1.0, 2.0], [math.inf, 1.0])]
)
def test_nothing_is_sure_of_one_example_or_of_what_is_no_number(before: list[float], after: list[float]) -> None:
    assert Gain.between(np.array(before), np.array(after)).lower == -math.inf


def test_other_examples_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="shapes"):
        Gain.between(np.ones(3), np.ones(4))
