"""What is worth training: new data, what may gain, what has drifted and what was left for long; and nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.worth.decision import BACK_OFF, MOST_UNADOPTED, STALE_S, Decision, Seen, Taught, decide, learnt, unchanged
from client.worth.drift import ALARM, PageHinkley
from client.worth.memory import DomainMemory, Memory

NOW = 1e9
DRIFTED = PageHinkley(total=ALARM, lowest=0.0)
HALF = PageHinkley(total=ALARM / 2, lowest=0.0)


def taught(rate: float = 0.0, seconds: float = 10.0, more: bool = False) -> Taught:
    return Taught(rate=rate, seconds=seconds, more=more, reached={1: 0.5, 2: 0.7})


def after(**rounds: list[Taught]) -> Memory:
    """What is remembered after rounds in which each domain that is named was trained, and all were seen."""
    memory, seen = Memory(), {key: Seen(share=1 / len(rounds)) for key in rounds}
    for number in range(max(map(len, rounds.values()))):
        now = {key: ends[number] for key, ends in rounds.items() if number < len(ends)}
        memory = learnt(memory, seen, now, NOW)
    return memory


def test_what_was_never_trained_is_trained() -> None:
    assert decide(Memory(), {"a": Seen(share=1.0)}, NOW) == Decision(train=("a",))
    found = decide(after(a=[taught()] * 2), {"a": Seen(share=0.5), "b": Seen(share=0.5)}, NOW)
    assert (found.train, found.doubtful) == (("b",), False)


def test_what_still_gained_is_trained_again_without_doubt() -> None:
    found = decide(after(a=[taught(0.1, more=True)]), {"a": Seen(share=1.0)}, NOW)
    assert found == Decision(train=("a",))


def test_one_round_without_more_is_not_enough() -> None:
    assert decide(after(a=[taught(0.1)]), {"a": Seen(share=1.0)}, NOW) == Decision(train=("a",))
    assert decide(after(a=[taught(), taught(0.1, more=True), taught()]), {"a": Seen(share=1.0)}, NOW).train


@pytest.mark.parametrize("rate", [0.0, 1e-3, 5.0])
def test_what_brought_nothing_more_is_left_out_and_the_reason_says_so(rate: float) -> None:
    found = decide(after(a=[taught(rate)] * 2), {"a": Seen(share=1.0)}, NOW)
    assert (found.train, "brought nothing more" in found.reason) == ((), True)


def test_it_is_tried_for_a_few_steps_when_the_trial_is_long_ago() -> None:
    memory = after(a=[taught(0.1)] * 2)
    assert not decide(memory, {"a": Seen(share=1.0)}, NOW + STALE_S - 1).train
    found = decide(memory, {"a": Seen(share=1.0)}, NOW + STALE_S)
    assert (found.train, found.doubtful) == (("a",), True)


def test_a_loss_above_what_was_reached_is_worth_as_much_as_it_may_gain() -> None:
    memory = after(a=[taught(0.01, seconds=10.0)] * 2)
    assert not decide(memory, {"a": Seen(share=1.0, above=0.05)}, NOW).train, "0.005 a second, and 0.015 are needed"
    found = decide(memory, {"a": Seen(share=1.0, above=0.2)}, NOW)
    assert (found.train, found.doubtful) == (("a",), False)


def test_drift_is_trained_whatever_the_score() -> None:
    memory = after(a=[taught()] * 2, b=[taught()] * 2)
    found = decide(memory, {"a": Seen(share=0.9), "b": Seen(share=0.1, drift=DRIFTED)}, NOW)
    assert found == Decision(train=("b",), drifted=frozenset("b"))


def test_half_a_drift_makes_a_score_half_again_as_large_which_is_what_is_needed() -> None:
    assert BACK_OFF == 1.5
    memory = after(a=[taught(0.1)] * 2)
    assert decide(memory, {"a": Seen(share=1.0, drift=HALF)}, NOW).train == ("a",)


def test_an_update_that_is_never_adopted_is_made_three_times() -> None:
    memory = after(a=[taught(0.1, more=True)])
    for made in range(MOST_UNADOPTED):
        assert decide(memory.model_copy(update={"unadopted": made}), {"a": Seen(share=1.0)}, NOW).train
    memory = memory.model_copy(update={"unadopted": MOST_UNADOPTED})
    assert "none was adopted" in decide(memory, {"a": Seen(share=1.0)}, NOW).reason
    assert decide(memory, {"a": Seen(share=1.0, drift=DRIFTED)}, NOW).train
    assert decide(memory, {"a": Seen(share=1.0)}, NOW + STALE_S).train


def test_the_drift_of_what_is_left_out_adds_up_and_begins_anew_once_it_is_trained() -> None:
    memory = learnt(after(a=[taught()] * 2), {"a": Seen(share=1.0, drift=HALF)}, {}, NOW)
    assert memory.domain("a").drift == HALF
    assert learnt(memory, {"a": Seen(share=1.0, drift=DRIFTED)}, {"a": taught()}, NOW).domain("a").drift.drift == 0


def test_nothing_is_looked_at_again_while_version_and_data_are_the_same() -> None:
    memory = after(a=[taught()] * 2).model_copy(update={"parent": "p", "data": "d", "reason": "flat"})
    assert unchanged(memory, "p", "d", NOW) == "flat"
    assert (unchanged(memory, "q", "d", NOW), unchanged(memory, "p", "e", NOW)) == ("", "")
    assert unchanged(memory, "p", "d", NOW + STALE_S) == ""
    assert unchanged(memory.model_copy(update={"reason": ""}), "p", "d", NOW) == "", "it was worth training"


RATES = st.floats(0, 10, allow_subnormal=False)


@given(st.lists(st.tuples(RATES, st.floats(0.001, 1e3), st.booleans()), min_size=1, max_size=6), st.integers(0, 50))
def test_after_a_flat_end_nothing_is_trained_until_something_has_changed(
    rounds: list[tuple[float, float, bool]], looks: int
) -> None:
    memory = after(a=[taught(rate, seconds, more) for rate, seconds, more in rounds] + [taught(rounds[-1][0])] * 2)
    for _ in range(looks):
        assert not decide(memory, {"a": Seen(share=1.0)}, NOW).train
        memory = learnt(memory, {"a": Seen(share=1.0)}, {}, NOW)


@given(RATES, RATES, st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_a_decision_always_has_domains_or_a_reason(a: float, b: float, above: float, drift: float, more: bool) -> None:
    seen = {
        "a": Seen(share=0.5, above=above),
        "b": Seen(share=0.5, drift=PageHinkley(total=drift * 2 * ALARM, lowest=0.0)),
    }
    found = decide(after(a=[taught(a, more=more)], b=[taught(b)] * 2), seen, NOW)
    assert bool(found.train) != bool(found.reason)
    assert found.drifted <= set(found.train) <= set(seen)


def test_what_is_remembered_is_numbers_and_survives_json() -> None:
    memory = after(a=[taught(0.1)] * 2, b=[taught(0.2, more=True)])
    assert Memory.model_validate_json(memory.model_dump_json()) == memory
    assert memory.domain("c") == DomainMemory()
