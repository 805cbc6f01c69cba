"""How the governor's margins move: only beside training, a step per burst, careful again after a pause."""

import numpy as np
import pytest

from serving.cotrainer.governor import PAUSE_S, Finished, Load, SloGovernor
from serving.cotrainer.slo import BURST_S, MARGIN, MARGIN_START, MARGIN_STEP
from tests.toys.serving.latencies import SLO, known

IN_TIME = Finished(0.1, 0.01, tokens=5, trained_before_first=0.01, trained_after_first=0.01)
LATE = Finished(0.3, 0.04, tokens=5, trained_before_first=0.2, trained_after_first=0.1)
ALLOWED = (1 - SLO.quantile) / 4


def governor() -> SloGovernor:
    return SloGovernor(SLO, known(), share_floor=0.0, share_cap=1.0)


def margins(made: SloGovernor) -> tuple[float, float]:
    return made.margin_ttft.value, made.margin_tpot.value


@pytest.mark.parametrize("trained", [0.0, 0.5])
def test_only_lateness_by_training_widens_a_margin(trained: float) -> None:
    made = governor()
    made.finished(Finished(0.5, 0.1, 5, trained_before_first=trained, trained_after_first=trained), now=0.0)
    assert margins(made) == ((MARGIN_START + MARGIN_STEP * (1 - ALLOWED),) * 2 if trained else (MARGIN_START,) * 2)


def test_requests_beside_which_nothing_was_trained_move_nothing() -> None:
    """An hour of users without a job, on time and late, leaves the margins where training had brought them."""
    made = governor()
    for second in range(3600):
        made.finished(Finished(0.1 + 0.4 * (second % 7 == 0), 0.01, tokens=5), now=float(second))
    assert margins(made) == (MARGIN_START, MARGIN_START)
    assert made.answered == 3600


def test_each_margin_moves_by_its_own_part_of_a_request() -> None:
    made = governor()
    made.finished(Finished(0.1, 0.01, tokens=5, trained_before_first=0.01), now=0.0)
    assert made.margin_ttft.value < MARGIN_START == made.margin_tpot.value
    made.finished(Finished(0.1, 0.01, tokens=5, trained_after_first=0.01), now=1.0)
    assert made.margin_tpot.value == made.margin_ttft.value
    made.finished(Finished(0.1, None, tokens=0, trained_before_first=0.01), now=2.0)
    assert made.margin_ttft.value < made.margin_tpot.value, "an answer of one token says nothing of TPOT"


def test_margins_stay_in_their_range() -> None:
    made = governor()
    for number in range(50):
        made.finished(LATE, now=number * BURST_S)
    assert margins(made) == (MARGIN[1], MARGIN[1])
    for number in range(10_000):
        made.finished(IN_TIME, now=1e6 + number)
    assert margins(made) == (MARGIN[0], MARGIN[0])


def test_a_burst_of_late_requests_is_one_step() -> None:
    made, once = governor(), governor()
    once.finished(LATE, now=0.0)
    for number in range(6):
        made.finished(LATE, now=number * 0.99 * BURST_S / 5)
    assert margins(made)[0] <= MARGIN_START + MARGIN_STEP
    assert margins(made) == pytest.approx(margins(once), abs=2 * MARGIN_STEP * ALLOWED)
    made.finished(LATE, now=BURST_S)
    assert margins(made) == pytest.approx((MARGIN_START + 2 * MARGIN_STEP,) * 2, abs=0.001), "another burst"


def test_what_six_late_requests_cost_is_earned_back_with_four_hundred() -> None:
    made = governor()
    for _ in range(6):
        made.finished(LATE, now=0.0)
    count = 0
    while margins(made)[0] > MARGIN_START:
        count += 1
        made.finished(IN_TIME, now=BURST_S + count)
    assert count == pytest.approx(1 / ALLOWED, abs=2)


@pytest.mark.parametrize("per_second", [0.1, 4.0, 100.0, 1000.0])
@pytest.mark.parametrize("times_allowed", [4.0, 0.25])
def test_at_any_rate_the_margin_goes_where_the_share_of_late_requests_sends_it(
    per_second: float, times_allowed: float
) -> None:
    """More than the allowed share are late: up, although a burst counts once; fewer: down. By the governor's clock."""
    made, rng = governor(), np.random.default_rng(0)
    late = rng.random(60_000) < times_allowed * ALLOWED
    for number, one in enumerate(late):
        made.finished(LATE if one else IN_TIME, now=number / per_second)
        assert MARGIN[0] <= made.margin_ttft.value <= MARGIN[1]
    assert made.margin_ttft.value > 0.7 if times_allowed > 1 else made.margin_ttft.value < 0.1


def test_the_share_of_late_requests_ends_at_the_allowed_one() -> None:
    """Requests that are late unless the margin is wide: the law of adaptive conformal inference, bursts or none."""
    rng, made = np.random.default_rng(0), governor()
    late = 0
    for number, wanted in enumerate(rng.exponential(0.08, 40_000)):
        missed = bool(wanted > made.margin_tpot.value)
        late += missed
        made.finished(LATE if missed else IN_TIME, now=number / 4)
    assert late / 40_000 <= ALLOWED + (MARGIN[1] - MARGIN[0]) / (MARGIN_STEP * 40_000) + 3 * (ALLOWED / 40_000) ** 0.5


def test_a_round_after_a_pause_begins_carefully_again() -> None:
    made = governor()
    made.budget(Load(), now=0.0)
    made.margin_ttft.value, made.margin_tpot.value = MARGIN[0], 0.6
    made.budget(Load(), now=PAUSE_S + 1)
    assert margins(made) == (MARGIN_START, 0.6), "what was learnt from late requests is kept"


@pytest.mark.parametrize("ask", ["budget", "wait"])
def test_rounds_without_a_pause_between_them_keep_their_margins(ask: str) -> None:
    made = governor()
    for number in range(10):
        made.budget(Load(), now=number * PAUSE_S) if ask == "budget" else made.wait(now=number * PAUSE_S)
        made.margin_ttft.value = made.margin_tpot.value = MARGIN[0]
    assert margins(made) == (MARGIN[0], MARGIN[0])
