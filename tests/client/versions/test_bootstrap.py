"""Intervals of differences: never narrower than Student's, and widened on the side where a tail may be unseen."""

import math

import numpy as np
import numpy.typing as npt
import pytest

from client.versions.bootstrap import Difference, mean_difference, widening

Floats = npt.NDArray[np.float64]
ALPHA = 0.025


def difference(changes: Floats) -> Difference:
    return mean_difference(20 * changes, np.full(len(changes), 20.0), 4.0, ALPHA)


def few_much_worse(clusters: int) -> Floats:
    changes = np.random.default_rng(0).normal(-0.1, 0.05, clusters)
    changes[: clusters // 15] += 0.5
    return changes


def test_the_interval_is_widened_on_the_side_of_the_tail_only() -> None:
    worse, better = difference(few_much_worse(30)), difference(-few_much_worse(30))
    assert worse.skewness == pytest.approx(-better.skewness)
    assert (worse.widened > 1.5, better.widened) == (True, 1.0)
    assert (worse.low, worse.high) == pytest.approx((-better.high, -better.low))
    assert (worse.p_lower, worse.p_higher) == pytest.approx((better.p_higher, better.p_lower))
    assert worse.high - worse.value > 2 * (worse.value - worse.low)


def test_what_is_not_skewed_is_not_widened() -> None:
    assert widening(0.5, 30) == widening(3 / math.sqrt(200), 200) == widening(-9.0, 30) == widening(0.0, 0) == 1.0
    assert widening(2.0, 30) > widening(2.0, 64) > widening(2.0, 200) > 1


@pytest.mark.parametrize("clusters", [5, 30, 200])
def test_no_interval_is_narrower_than_students(clusters: int) -> None:
    """2.776, 2.045 and 1.972 standard errors to both sides."""
    quantile = {5: 2.776, 30: 2.045, 200: 1.972}[clusters]
    changes = np.random.default_rng(1).normal(0, 1, clusters)
    found, error = difference(changes), changes.std(ddof=1) / math.sqrt(clusters)
    assert min(found.high - found.value, found.value - found.low) >= 0.999 * quantile * error


@pytest.mark.parametrize("level", [0.2, ALPHA, 0.001])
def test_a_p_value_and_an_interval_say_the_same(level: float) -> None:
    for changes in (few_much_worse(64), -few_much_worse(64)):
        found = mean_difference(20 * changes, np.full(64, 20.0), 4.0, level)
        assert (found.high < 0) == (found.p_lower < level)
        assert (found.low > 0) == (found.p_higher < level)


def test_as_many_as_would_be_enough_are_enough() -> None:
    found = difference(few_much_worse(30))
    assert found.high > 0
    enough = found.enough(1.0)
    assert 30 < enough < 300
    assert difference(few_much_worse(2 * enough)).high < 0


def test_what_is_alike_everywhere_has_no_skewness_and_no_sign_of_its_zeros() -> None:
    found = difference(np.zeros(30))
    assert (found.skewness, found.p_lower, found.p_higher) == (0.0, 1.0, 1.0)
    assert str(found) == "+0.0000 (+0.0000 to +0.0000)"
