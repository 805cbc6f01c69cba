"""The governor by simulation: a clock of numbers, quanta of any length, a busy engine or an idle one."""

from itertools import combinations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from serving.governor import FixedGovernor, Load

IDLE, BUSY, QUEUED = Load(running=0, waiting=0), Load(running=4, waiting=0), Load(running=4, waiting=2)
Ran = tuple[float, float]
"""When a burst of quanta began, and ended."""


def simulate(governor: FixedGovernor, quanta: list[float], iteration_s: float, load: Load) -> list[Ran]:
    """Drive it as the co-trainer does; the bursts that ran."""
    now, left, bursts = 0.0, list(quanta), list[Ran]()
    while left:
        began = now
        allowed = governor.quanta(load, now) if load is not IDLE else int(governor.wait(now) <= 0)
        for _ in range(min(allowed, len(left))):
            seconds = left.pop()
            now += seconds
            governor.ran(seconds, now)
        if now > began:
            bursts.append((began, now))
        now += iteration_s if load is not IDLE else max(governor.wait(now), 1e-6)
    return bursts


@given(
    st.lists(st.floats(0.001, 1.0), min_size=2, max_size=20),
    st.floats(0.05, 1.0),
    st.integers(1, 4),
    st.floats(0.001, 0.3),
    st.sampled_from([IDLE, BUSY, QUEUED]),
)
@example([0.1] * 20, 0.5, 4, 0.001, BUSY)
@example([0.1] * 20, 0.5, 1, 0.001, BUSY)
def test_the_share_holds_over_every_window(
    quanta: list[float], share: float, per_iteration: int, iteration_s: float, load: Load
) -> None:
    """Whatever stretch one looks at: at most its share of training, and the one burst that it may begin in."""
    bursts = simulate(FixedGovernor(per_iteration, share), quanta, iteration_s, load)
    burst = max(end - began for began, end in bursts)
    for (i, (first, _)), (j, (_, last)) in combinations(list(enumerate(bursts)), 2):
        trained = sum(end - began for began, end in bursts[i : j + 1])
        assert trained <= share * (last - first) + (1 - share) * burst + 1e-6


@given(st.floats(0.05, 1.0), st.floats(0.001, 1.0))
def test_an_idle_engine_gives_training_all_of_its_share(share: float, seconds: float) -> None:
    bursts = simulate(FixedGovernor(1, share), [seconds] * 10, 0.0, IDLE)
    assert bursts[-1][1] <= 10 * seconds / share + 10 * 1e-5


@pytest.mark.parametrize("per_iteration", [0, 1, 4])
def test_one_quantum_at_most_while_a_request_waits(per_iteration: int) -> None:
    governor = FixedGovernor(per_iteration, share_cap=1.0)
    assert governor.quanta(BUSY, now=0.0) == per_iteration
    assert governor.quanta(QUEUED, now=0.0) == min(1, per_iteration)


def test_without_a_cap_there_is_no_rest() -> None:
    governor = FixedGovernor(2, share_cap=1.0)
    governor.ran(5.0, now=5.0)
    assert (governor.quanta(BUSY, 5.0), governor.wait(5.0)) == (2, 0.0)


def test_with_a_cap_a_quantum_is_followed_by_its_rest() -> None:
    governor = FixedGovernor(1, share_cap=0.25)
    governor.ran(1.0, now=10.0)
    assert (governor.quanta(BUSY, 12.9), governor.wait(12.0)) == (0, 1.0)
    assert (governor.quanta(BUSY, 13.0), governor.wait(13.5)) == (1, 0.0)
