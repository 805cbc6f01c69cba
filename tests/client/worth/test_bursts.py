"""Bursts: where each one ends, when there is no further one, and which rows are drawn."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.worth.bursts import LEAST, MOST_REPEATED, REPLAY, TRIAL, WORTH, Bursts, rows_to_draw

BEFORE = np.linspace(1.0, 3.0, 20)


def ends(falls: list[float], steps: int = 40, **changes: object) -> tuple[list[int], Bursts]:
    """Run bursts of which each lowers all losses by its fall; return where they ended."""
    bursts = Bursts(BEFORE, steps, **changes)  # type: ignore[arg-type]
    losses = BEFORE
    for fall in falls:
        if not (until := bursts.until):
            break
        losses = losses - fall
        bursts.add(until, losses)
    return bursts.taken, bursts


def test_a_round_takes_all_its_steps_as_long_as_the_loss_falls() -> None:
    taken, bursts = ends([0.1] * 9)
    assert taken == [10, 20, 30, 40]
    assert (bursts.until, bursts.best, bursts.pays, bursts.flat) == (0, 3, True, False)


def test_a_round_ends_when_the_loss_has_not_fallen_over_two_bursts_and_sends_its_best() -> None:
    taken, bursts = ends([0.5, -0.01, 0.0, 0.5])
    assert taken == [10, 20, 30]
    assert (bursts.best, bursts.pays, bursts.flat) == (0, True, True)


def test_less_than_what_it_is_worth_counts_as_flat() -> None:
    fall = WORTH * (BEFORE.mean() - 0.5) / 2
    assert ends([0.5, 0.9 * fall, 0.9 * fall, 0.5])[0] == [10, 20, 30]
    assert ends([0.5, 1.1 * fall, 1.1 * fall, 0.5])[0] == [10, 20, 30, 40], "both together are enough"


def test_what_is_not_sure_counts_as_flat() -> None:
    bursts = Bursts(BEFORE, 40)
    noise = np.tile([1.0, -1.0], 10)
    for number in (1, 2):
        bursts.add(10 * number, BEFORE - 0.02 * number + number * noise)
    assert (bursts.flat, bursts.pays, bursts.until) == (True, False, 0)


def test_a_doubtful_round_tries_a_few_steps_and_goes_on_only_if_they_pay() -> None:
    assert ends([0.0, 0.5], doubtful=True)[0] == [TRIAL]
    assert ends([0.5] * 9, doubtful=True)[0] == [TRIAL, 14, 24, 34, 40]
    assert ends([0.0], doubtful=True, warmup=6)[0] == [TRIAL + 6]
    taken, bursts = ends([0.0, 0.5])
    assert (taken, bursts.pays) == ([10, 20], True), "one that is not goes on: the second burst may pay"


@given(st.integers(1, 500), st.booleans(), st.integers(0, 600))
def test_bursts_grow_end_within_the_plan_and_are_few(steps: int, doubtful: bool, warmup: int) -> None:
    taken, _ = ends([0.1] * 9, steps, doubtful=doubtful, warmup=warmup)
    assert taken == sorted(set(taken))
    assert taken[-1] == steps
    assert len(taken) <= 5
    assert all(after - before >= min(LEAST, steps - before) for before, after in itertools.pairwise(taken))


def test_losses_that_are_no_numbers_pay_nothing() -> None:
    _, bursts = ends([np.nan])
    assert not bursts.pays


@given(
    st.integers(0, 60), st.integers(0, 40), st.integers(0, 60), st.integers(0, 3),
)  # fmt: skip
def test_everything_chosen_is_drawn_and_of_the_rest_a_share(old: int, fresh: int, others: int, seed: int) -> None:
    if not old + fresh:
        return
    chosen = list(range(old + fresh))
    drawn = rows_to_draw(chosen, chosen[old:], list(range(1000, 1000 + others)), seed).tolist()
    assert set(chosen) <= set(drawn)
    assert all(drawn.count(row) == 1 for row in chosen[:old])
    assert len({drawn.count(row) for row in chosen[old:]}) <= 1
    replayed = [row for row in drawn if row >= 1000]
    assert len(set(replayed)) == len(replayed) <= REPLAY * len(drawn)
    assert drawn == rows_to_draw(chosen, chosen[old:], list(range(1000, 1000 + others)), seed).tolist()


@pytest.mark.parametrize(("old", "fresh", "times"), [(100, 100, 4), (100, 400, 1), (400, 5, MOST_REPEATED)])
def test_fresh_rows_are_most_of_what_is_drawn_but_none_is_drawn_without_end(old: int, fresh: int, times: int) -> None:
    chosen = list(range(old + fresh))
    assert rows_to_draw(chosen, chosen[old:], [], 0).tolist().count(old) == times
