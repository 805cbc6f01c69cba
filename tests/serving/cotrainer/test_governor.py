"""The governor's arithmetic, on an engine whose latencies are known exactly."""

import doctest
import math

import pytest

from serving.cotrainer import governor as governor_module
from serving.cotrainer.governor import Finished, Load, SloGovernor, Stream, Waiting
from serving.cotrainer.predictor import Batch, Predictor
from serving.cotrainer.slo import Slo
from tests.toys.serving.latencies import DECODE_S, PREFILL_S, QUANTUM_S, SLO, known

DECODE, PREFILL = Batch("decode", 1, cached_tokens=10), Batch("prefill", 1, 10, 50)


def governor(slo: Slo | None = SLO, share_floor: float = 0.0, share_cap: float = 1.0) -> SloGovernor:
    """One that has no margin to speak of, and whose next iteration is not the one that it keeps free of training."""
    made = SloGovernor(slo, known(), share_floor=share_floor, share_cap=share_cap)
    made.margin_ttft.value = made.margin_tpot.value = 0.0
    made.iterated(DECODE, DECODE_S)
    return made


def streaming(tokens: int, since: float = 0.0, interactive: bool = True) -> Load:
    return Load(streams=(Stream(since, tokens, 10, interactive),))


def waiting(*arrivals: float, interactive: bool = True) -> Load:
    return Load(waiting=tuple(Waiting(at, 10, interactive) for at in arrivals))


def test_a_stream_lends_what_its_tokens_have_saved() -> None:
    """After 3 tokens in 100 ms: 4 × 30 ms are promised, 100 are gone, 10 are for the next token."""
    assert governor().budget(streaming(tokens=3), now=0.1) == pytest.approx(0.010)
    assert governor().budget(streaming(tokens=3), now=0.115) == 0.0


def test_the_margin_is_kept_free() -> None:
    careful = governor()
    careful.margin_tpot.value = 0.05
    assert careful.budget(streaming(tokens=3), now=0.1) == pytest.approx(4 * 0.03 * 0.95 - 0.1 - DECODE_S)


def test_a_rich_stream_is_not_stalled_for_long() -> None:
    assert governor().budget(streaming(tokens=1000), now=0.1) == pytest.approx(QUANTUM_S + 0.5 * SLO.tpot_s)


def test_the_tightest_stream_counts() -> None:
    poor, rich = Stream(0.0, 3, 10), Stream(0.0, 50, 10)
    for streams in ((poor, rich), (rich, poor)):
        assert governor().budget(Load(streams), now=0.1) == pytest.approx(0.010)


def test_a_part_of_the_ttft_slack_is_spent_while_a_request_waits() -> None:
    free = governor().budget(waiting(0.0), now=0.0)
    later = governor().budget(waiting(0.0), now=0.1)
    assert QUANTUM_S < later < free < SLO.ttft_s - PREFILL_S
    assert governor().budget(waiting(0.0), now=SLO.ttft_s) == 0.0


def test_the_oldest_request_counts() -> None:
    assert governor().budget(waiting(0.1, 0.0), 0.1) == governor().budget(waiting(0.0), 0.1)


def test_the_batch_class_has_more_time_until_an_interactive_request_is_there() -> None:
    """A batch request alone leaves room where an interactive one would not, and never closes the gate for one."""
    batch = Stream(0.0, 3, 10, interactive=False)
    tight = Stream(0.0, 3, 10)
    assert governor().budget(Load((batch,)), 0.2) > 0
    assert governor().budget(Load((batch, tight)), 0.2) == governor().budget(Load((tight,)), 0.2) == 0.0
    assert governor().budget(Load((batch, tight)), 0.1) == governor().budget(Load((tight,)), 0.1) > 0
    assert governor().budget(waiting(0.0, interactive=False), SLO.ttft_s) > 0


def test_prefills_that_come_often_are_reserved_for() -> None:
    quiet, busy = governor(), governor()
    for _ in range(50):
        busy.iterated(PREFILL, PREFILL_S)
        quiet.iterated(DECODE, DECODE_S)
    assert (busy.budget(streaming(3), 0.1), quiet.budget(streaming(3), 0.1)) == (0.0, pytest.approx(0.010))


def test_now_and_then_an_iteration_runs_without_training() -> None:
    made = governor()
    budgets = []
    for _ in range(256):
        budgets.append(made.budget(streaming(4), 0.1))
        made.iterated(DECODE, DECODE_S)
    assert budgets.count(0.0) == 4


def test_without_a_cap_there_is_no_rest() -> None:
    made = governor()
    made.ran(5.0, now=5.0)
    assert (made.budget(Load(), 5.0) > 0, made.wait(5.0)) == (True, 0.0)


def test_with_a_cap_a_quantum_is_followed_by_its_rest() -> None:
    made = governor(share_cap=0.25)
    made.ran(1.0, now=10.0)
    assert (made.budget(Load(), 12.9), made.wait(12.0)) == (0.0, pytest.approx(1.0))
    assert (made.budget(Load(), 13.0) > 0, made.wait(13.5)) == (True, 0.0)


def test_the_floor_breaks_the_targets_and_says_for_how_long() -> None:
    made = governor(share_floor=0.1)
    late = streaming(tokens=1)
    assert made.budget(late, now=1.0) == 0.0
    assert made.budget(late, now=2.0) == pytest.approx(QUANTUM_S)
    made.ran(QUANTUM_S, now=2.0)
    assert made.slo_debt_s == pytest.approx(QUANTUM_S)


def test_training_within_the_targets_is_no_debt() -> None:
    made = governor(share_floor=0.1)
    for now in (0.1, 0.1):
        assert made.budget(streaming(tokens=3), now) > 0
        made.ran(QUANTUM_S, now)
    assert made.slo_debt_s == 0.0


NAN = math.nan


DEAD = {
    "clock": (streaming(9), NAN),
    "clock_idle": (Load(), NAN),
    "clock_waiting": (waiting(0.0), NAN),
    "stream": (Load((Stream(NAN, 9, 10),)), 0.1),
    "last_stream": (Load((Stream(0.0, 9, 10), Stream(NAN, 9, 10))), 0.1),
    "arrival": (waiting(NAN), 0.1),
    "last_arrival": (waiting(0.0, NAN), 0.1),
}


@pytest.mark.parametrize("case", DEAD)
def test_a_dead_input_closes(case: str) -> None:
    load, now = DEAD[case]
    assert governor().budget(load, now) == 0.0


def test_a_dead_clock_closes_an_idle_engine() -> None:
    assert governor().wait(NAN) == math.inf


@pytest.mark.parametrize("load", [streaming(9), waiting(0.1)])
def test_without_targets_or_knowledge_nothing_is_trained_beside_users(load: Load) -> None:
    assert governor(slo=None).budget(load, 0.1) == 0.0
    unknowing = SloGovernor(SLO, Predictor(), share_floor=0.0, share_cap=1.0)
    assert unknowing.budget(load, 0.1) == 0.0
    assert (governor(slo=None).wait(0.1), unknowing.wait(0.1)) == (0.0, 0.0)


def test_requests_that_met_both_targets_are_counted() -> None:
    asked = governor()
    late_first, late_later = Finished(ttft=0.3, tpot=0.01, tokens=4), Finished(ttft=0.1, tpot=0.04, tokens=4)
    in_time, one_token = Finished(ttft=0.2, tpot=0.03, tokens=4), Finished(ttft=0.1, tpot=None, tokens=0)
    nobody_waits = Finished(ttft=1.9, tpot=0.29, tokens=4, interactive=False)
    for request in (late_first, late_later, in_time, one_token, nobody_waits):
        asked.finished(request, now=1.0)
    assert (asked.answered, asked.met) == (5, 3)
    unknown = governor(slo=None)
    unknown.finished(in_time, now=1.0)
    assert (unknown.answered, unknown.met) == (0, 0)


def test_the_example_of_the_docstring_is_true() -> None:
    assert doctest.testmod(governor_module).failed == 0
    assert doctest.testmod(governor_module).attempted > 0
