"""The verdict by pairs of answers: promoted, rejected or kept by the preference accuracy alone."""

from typing import Any

import numpy as np
import pytest

from client.heldout_looks import Look
from client.versions.verdict import Probe, judge
from serving.scores import Scores
from tests.client.versions.test_verdict_errors import ALPHA, POLICY, SIZES, bound, rates
from umbel.messages import Verdict
from umbel.site.sections import ShadowSection

PAIRS = 64


def pairs(right: Any) -> Scores:
    """Scores of pairs of which those that are marked are right: margins of 2 and -2 nats."""
    margins = np.where(right, 2.0, -2.0)
    rows = np.stack((10 - margins, np.full(len(margins), 10.0)), axis=1).flatten()
    return Scores(rows, np.full(len(rows), 5, np.int32), np.full(len(rows), False)).paired()


def first(count: int, of: int = PAIRS) -> Scores:
    return pairs(np.arange(of) < count)


def verdict(shadow: Scores, live: Scores, look: Look | None = None, **policy: Any) -> Verdict:
    return judge(Probe({"base": first(20), "live": live, "shadow": shadow}, {}), ShadowSection(**policy), look)


def test_a_higher_accuracy_is_promoted() -> None:
    found = verdict(first(50), first(30))
    assert found.decision == "promote"
    (reason,) = found.reasons
    assert reason.startswith("held-out preference accuracy 78.1% against live's 46.9%: higher, +0.3125 (+0.")
    assert reason.endswith("at 95 % confidence, 64 pairs")


def test_a_lower_one_is_rejected_unless_it_is_within_what_is_allowed() -> None:
    found = verdict(first(30), first(50))
    assert (found.decision, "lower, -0.3125" in found.reasons[0]) == ("reject", True)
    assert verdict(first(48), first(50)).decision == "keep", "two pairs can be luck"
    assert verdict(first(30), first(50), max_exact_drop=0.5).decision == "keep"


def test_the_same_accuracy_is_kept_however_far_the_margins_moved() -> None:
    live = first(32)
    surer = Scores(np.where(live.exact, live.loss / 9, live.loss), live.tokens, live.exact, pairs=True)
    found = verdict(surer, live)
    assert found.decision == "keep"
    assert "no clear difference" in found.reasons[0]


@pytest.mark.parametrize(("gained", "decision"), [(6, "keep"), (7, "promote")])
def test_few_pairs_that_changed_sides_are_counted_exactly(gained: int, decision: str) -> None:
    """With none lost, McNemar's p is 2^-6 = 0.0156 or 2^-7 = 0.0078; the first look asks for 0.0152."""
    assert verdict(first(30 + gained), first(30)).decision == decision


def test_later_looks_ask_for_more_and_say_so() -> None:
    assert verdict(first(37), first(30)).decision == "promote"
    found = verdict(first(37), first(30), Look(number=5, since=5))
    assert found.decision == "keep"
    assert "look 5 at them: p = 0.0078, and 0.00061 is asked for by now" in found.reasons[0]


def test_a_guard_of_answers_can_reject_what_pairs_are_for() -> None:
    policy = ShadowSection(guard=[{"name": "triage", "data": "t.jsonl"}])
    tokens, exact = np.full(PAIRS, 10, np.int32), np.full(PAIRS, False)
    spread = np.random.default_rng(0).normal(0, 0.1, PAIRS)
    guard = {"live": Scores(tokens * 1.0, tokens, exact), "shadow": Scores(tokens * (1.3 + spread), tokens, exact)}
    found = judge(Probe({"live": first(30), "base": first(20), "shadow": first(50)}, {"triage": guard}), policy)
    assert found.decision == "reject"
    assert found.reasons[0].startswith("guard triage loss")


def test_too_few_pairs_or_a_loss_that_is_no_number_promote_nothing() -> None:
    assert "too few to tell" in verdict(first(25, of=25), first(2, of=25)).reasons[0]
    broken = first(50)
    broken.loss[3] = np.nan
    assert verdict(broken, first(30)).decision == "reject"


@pytest.mark.parametrize("copies", [1, 4])
@pytest.mark.parametrize("count", SIZES)
def test_it_errs_as_seldom_as_the_confidence_says(count: int, copies: int) -> None:
    """A fifth of the pairs change sides, either way; copies of a pair are no evidence. A clear gain is found."""

    def make(generator: np.random.Generator, lost: float = 1 / 6, gained: float = 1 / 4) -> Probe:
        before, drawn = generator.random(count) < 0.6, generator.random(count)  # as many are lost as gained
        after = np.where(before, drawn >= lost, drawn < gained)
        groups = np.repeat(np.arange(count), copies).tolist()
        base, shadow = (pairs(np.repeat(right, copies)).grouped(groups) for right in (before, after))
        return Probe({"base": base, "shadow": shadow}, {})

    promoted, rejected = rates(make, POLICY)
    assert promoted <= bound(Look().level(ALPHA))
    assert rejected <= bound(ALPHA)
    assert rates(lambda generator: make(generator, 0.0, 0.9), POLICY, 50)[0] >= 0.9
