"""The Page–Hinkley test, counted over many series: how often it cries without a change, and how soon with one."""

from collections.abc import Callable

import numpy as np
import pytest

from client.worth.drift import ALARM, CUT, SLACK, PageHinkley

SERIES, LENGTH = 400, 64
Draw = Callable[[np.random.Generator, int], "np.ndarray[tuple[int], np.dtype[np.float64]]"]


def alarms(draw: Draw, above: float = 0.0) -> list[int]:
    """For each series the number of examples until the alarm, LENGTH + 1 where there is none."""
    found = []
    for seed in range(SERIES):
        losses = draw(np.random.default_rng(seed), LENGTH) + above
        state, at = PageHinkley(), LENGTH + 1
        for number, loss in enumerate(losses, start=1):
            state = state.after([float(loss)])
            if state.drift >= 1:
                at = number
                break
        found.append(at)
    return found


def normal(generator: np.random.Generator, count: int) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    return generator.standard_normal(count)


def skewed(generator: np.random.Generator, count: int) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    """Most losses are small and a few large, as those of answers are."""
    return generator.exponential(1.0, count) - 1.0


@pytest.mark.parametrize(("draw", "most"), [(normal, 0.02), (skewed, 0.06)])
def test_without_a_change_there_is_hardly_an_alarm(draw: Draw, most: float) -> None:
    assert sum(at <= LENGTH for at in alarms(draw)) <= most * SERIES


@pytest.mark.parametrize(("above", "within"), [(1.0, 24), (2.0, 10), (0.75, 40)])
def test_a_change_is_found_and_the_larger_the_sooner(above: float, within: int) -> None:
    found = alarms(normal, above)
    assert sum(at <= LENGTH for at in found) >= 0.97 * SERIES
    assert np.median(found) <= within


def test_losses_that_have_fallen_raise_none() -> None:
    assert sum(at <= LENGTH for at in alarms(normal, -1.0)) == 0


def test_one_odd_example_raises_no_alarm_whatever_its_loss() -> None:
    assert PageHinkley().after([1e9]).drift == pytest.approx((CUT - SLACK) / ALARM)


def test_examples_count_alike_in_one_look_and_in_several() -> None:
    losses = np.random.default_rng(1).standard_normal(50).tolist()
    state = PageHinkley()
    for loss in losses:
        state = state.after([loss])
    assert state == PageHinkley().after(losses)
    assert PageHinkley.model_validate_json(state.model_dump_json()) == state
