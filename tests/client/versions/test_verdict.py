"""The verdict on a shadow: a better one is promoted, a worse one rejected, one that cannot be told apart kept."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.heldout_looks import Look
from client.versions.verdict import Probe, judge
from serving.scores import Scores
from umbel.messages import Verdict
from umbel.site.sections import ShadowSection

EXAMPLES = 64


def scores(loss: float, *, seed: int = 0, noise: float = 0.0, exact: int = 0, examples: int = EXAMPLES) -> Scores:
    """About `loss` nats per token. Examples are as different as texts are, and the same in every call; `noise` is how
    far a version is off on a single one of them, and the first `exact` are answered right."""
    tokens = np.random.default_rng(7).integers(4, 40, examples)
    hard = np.random.default_rng(8).lognormal(0.0, 0.8, examples)
    off = 1 + noise * np.random.default_rng(seed).standard_normal(examples)
    per_token = loss * hard * off / np.average(hard, weights=tokens)
    return Scores(per_token * tokens, tokens.astype(np.int32), np.arange(examples) < exact)


def spoilt(found: Scores, value: float, at: int = 3) -> Scores:
    loss = found.loss.copy()
    loss[at] = value
    return Scores(loss, found.tokens, found.exact)


def verdict(shadow: Scores, live: Scores | None = None, base: Scores | None = None, **policy: Any) -> Verdict:
    """Judge a probe without guards; the live version has 2 nats by default, and with `base` there is none."""
    roles = {"base": base} if base is not None else {"base": scores(3.0), "live": scores(2.0) if live is None else live}
    return judge(Probe({**roles, "shadow": shadow}, {}), ShadowSection(**policy))


def guarded(guard: Scores, heldout: Scores, **settings: Any) -> Verdict:
    policy = ShadowSection(
        guard=[{"name": "arithmetic", "data": "a.jsonl"}, {"name": "triage", "data": "t.jsonl", **settings}]
    )
    good = {"live": scores(1.0), "shadow": scores(0.9)}
    heldouts = {"base": scores(3.0), "live": scores(2.0), "shadow": heldout}
    return judge(Probe(heldouts, {"arithmetic": good, "triage": {"live": scores(1.0), "shadow": guard}}), policy)


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_what_is_better_is_promoted(noise: float) -> None:
    found = verdict(scores(1.8, seed=1, noise=noise))
    assert (found.decision, found.accepted) == ("promote", True)
    assert found.reasons[0].startswith("held-out loss 1.")
    assert "against live's 2.0000: lower, -0." in found.reasons[0]
    assert found.reasons[0].endswith("per token at 95 % confidence, 64 examples")


def test_a_first_version_is_compared_with_the_base() -> None:
    assert verdict(scores(2.8), base=scores(3.0)).decision == "promote"
    found = verdict(scores(3.2), base=scores(3.0))
    assert found.decision == "reject"
    assert "against base's 3.0000: higher" in found.reasons[0]


def test_a_live_version_is_the_measure_even_where_the_base_is_worse() -> None:
    assert verdict(scores(2.5)).decision == "reject"


@pytest.mark.parametrize("seed", range(5))
def test_what_is_as_good_is_kept_and_nothing_changes(seed: int) -> None:
    same = verdict(scores(2.0))
    assert (same.decision, same.accepted) == ("keep", False)
    assert "no clear difference, +0.0000 (+0.0000 to +0.0000)" in same.reasons[0]
    noisy = verdict(scores(2.0, seed=seed, noise=0.3))
    assert noisy.decision == "keep"
    assert "no clear difference" in noisy.reasons[0]


def test_what_is_worse_is_rejected() -> None:
    found = verdict(scores(2.2, seed=1, noise=0.02))
    assert (found.decision, found.accepted) == ("reject", False)
    assert "higher, +0." in found.reasons[0]


def test_examples_are_compared_in_pairs() -> None:
    """A gain of 2 % on each of them shows, although they differ among each other by far more than that."""
    better, live = scores(1.96), scores(2.0)
    assert (live.loss / live.tokens).std() > 0.5
    assert verdict(better, live).decision == "promote"
    shuffled = np.random.default_rng(0).permutation(EXAMPLES)
    unpaired = Scores(better.loss[shuffled], better.tokens[shuffled], better.exact)
    assert verdict(unpaired, live).decision == "keep"


def test_one_long_answer_is_one_example() -> None:
    """Its many tokens move the mean, and yet they are no evidence for the others."""
    tokens = np.full(40, 5, np.int32)
    tokens[0] = 4000
    live = Scores(tokens * 2.0, tokens, np.zeros(40, np.bool_))
    shadow = spoilt(live, float(live.loss[0]) * 0.5, at=0)
    found = verdict(shadow, live)
    assert found.decision == "keep"
    assert shadow.sums.loss < 0.6 * live.sums.loss


@pytest.mark.parametrize(
    ("loss", "ratio", "decision", "bar"),
    [(2.0, 1.02, "promote", "1.02 × live's"), (2.02, 1.02, "promote", "1.02 × live's"),
     (2.1, 1.02, "reject", "1.02 × live's"), (1.9, 0.9, "keep", "0.9 × live's"), (1.7, 0.9, "promote", "0.9 × live's"),
     (2.1, 0.9, "reject", "against live's"), (150.0, 100.0, "promote", "100 × live's")],
)  # fmt: skip
def test_the_ratio_says_how_much_is_allowed_or_asked_for(loss: float, ratio: float, decision: str, bar: str) -> None:
    found = verdict(scores(loss), max_loss_ratio=ratio)
    assert found.decision == decision
    assert bar in found.reasons[0]


def test_more_confidence_asks_for_more_evidence() -> None:
    shadow = scores(1.9, seed=3, noise=0.2)
    decisions = [verdict(shadow, confidence=confidence).decision for confidence in (0.6, 0.9999)]
    assert decisions == ["promote", "keep"]


def test_answers_that_are_right_no_more_weigh_more_than_a_lower_loss() -> None:
    live = scores(2.0, exact=30)
    assert verdict(scores(1.8, exact=30), live).decision == "promote"
    found = verdict(scores(1.8, exact=15), live)
    assert found.decision == "reject"
    assert found.reasons[0].startswith("held-out exact match 23.4% against live's 46.9%: lower, -0.2344 (-0.")
    assert verdict(scores(1.8, exact=15), live, max_exact_drop=0.5).decision == "promote"
    assert verdict(scores(1.8, exact=29), live).decision == "promote", "one of 64 is noise"


def test_a_version_poisoned_on_one_guard_is_rejected_by_its_name_however_good_it_is_otherwise() -> None:
    found = guarded(scores(1.4, seed=1, noise=0.1), scores(1.0))
    assert (found.decision, found.accepted) == ("reject", False)
    assert found.reasons[0].startswith("guard triage loss 1.")
    assert "1.01 × live's 1.0000: higher" in found.reasons[0]
    assert any(reason.startswith("held-out loss 1.0000") for reason in found.reasons)


def test_a_guard_is_held_to_its_own_ratio() -> None:
    assert guarded(scores(1.4), scores(1.0), max_loss_ratio=1.5).decision == "promote"
    assert guarded(scores(1.0), scores(1.0)).decision == "promote", "as good is good enough on a guard"
    assert guarded(scores(0.5), scores(2.0)).decision == "keep", "and no more than that"


@pytest.mark.parametrize("examples", [0, 1, 29])
def test_too_few_examples_decide_nothing_and_say_so(examples: int) -> None:
    found = verdict(cut(scores(0.1), examples), cut(scores(2.0), examples))
    assert found.decision == "keep"
    assert found.reasons == (f"held-out: {examples} examples are too few to tell; [shadow].min_examples is 30",)


def cut(found: Scores, examples: int) -> Scores:
    return Scores(found.loss[:examples], found.tokens[:examples], found.exact[:examples])


def test_a_guard_of_too_few_examples_lets_nothing_pass() -> None:
    heldouts = {"base": scores(3.0), "live": scores(2.0), "shadow": scores(1.0)}
    guard = {"live": cut(scores(1.0), 5), "shadow": cut(scores(1.0), 5)}
    policy = ShadowSection(guard=[{"name": "triage", "data": "t.jsonl"}])
    found = judge(Probe(heldouts, {"triage": guard}), policy)
    assert found.decision == "keep"
    assert found.reasons[0].startswith("guard triage: 5 examples are too few to tell")


def test_one_question_that_is_asked_often_is_one_example() -> None:
    live, shadow = scores(2.0, examples=90), scores(1.9, examples=90)
    few = verdict(shadow.grouped([n % 20 for n in range(90)]), live.grouped([n % 20 for n in range(90)]))
    assert few.decision == "keep"
    assert re.fullmatch(
        r"held-out: 90 examples that count as 1[0-9] are too few to tell; \[shadow\]\.min_examples is 30", *few.reasons
    )
    once = [0] * 90
    assert verdict(shadow.grouped(once), live.grouped(once), min_examples=1).decision == "keep"
    with pytest.raises(ValueError, match="same length"):
        verdict(shadow.grouped([0]), live)


def test_the_count_of_too_few_examples_is_not_rounded_up_to_what_would_be_enough() -> None:
    tokens = np.full(31, 20, np.int32)
    tokens[0] = 44
    live = Scores(2.0 * tokens.astype(np.float64), tokens, np.zeros(31, np.bool_))
    (told,) = verdict(live, live).reasons
    assert told.startswith("held-out: 31 examples that count as 29 are too few to tell")


def test_a_gain_by_which_a_few_examples_get_much_worse_says_how_many_would_be_enough() -> None:
    """Fewer than those cannot tell; as many of the same kind can."""
    even = {examples: few_much_worse(examples, worse=0) for examples in (64, 192)}
    found = {examples: few_much_worse(examples, worse=examples // 32) for examples in (64, 192)}
    assert [found.decision for found in even.values()] == ["promote", "promote"]
    assert [found.decision for found in found.values()] == ["keep", "promote"]
    told = re.search(
        r"; a few got much worse, and 64 examples tell badly how often that happens, so the interval is (\d\.\d) × as "
        r"wide; about (\d+) would be enough for this difference$", found[64].reasons[0]
    )  # fmt: skip
    assert told is not None
    assert float(told[1]) > 1.2
    assert 64 < int(told[2]) <= 192
    assert not any("much worse" in reason for one in even.values() for reason in one.reasons)


def few_much_worse(examples: int, worse: int) -> Verdict:
    tokens = np.full(examples, 20, np.int32)
    live = Scores(2.0 * tokens.astype(np.float64), tokens, np.zeros(examples, np.bool_))
    change = np.random.default_rng(2).normal(-0.1, 0.05, examples)
    change[:worse] += 0.5
    return verdict(Scores(tokens * (2.0 + change), tokens, live.exact), live)


def test_a_gain_that_is_plain_at_the_first_look_is_asked_for_more_surely_at_the_tenth() -> None:
    live, shadow = scores(2.0), scores(1.92, seed=5, noise=0.12)
    roles = {"base": scores(3.0), "live": live, "shadow": shadow}
    first, tenth, renewed = (
        judge(Probe(roles, {}), ShadowSection(), look) for look in (Look(), Look(10, 10), Look(10, 1))
    )
    assert [found.decision for found in (first, tenth, renewed)] == ["promote", "keep", "promote"]
    assert first.reasons[0].endswith(" 64 examples")
    assert ": perhaps lower, -0." in tenth.reasons[0]
    assert re.search(r"; look 10 at them: p = 0\.\d+, and 0\.00015 is asked for by now; give other", tenth.reasons[0])
    assert renewed.reasons[0].endswith(" 64 examples; look 10 at them")


def test_examples_that_were_asked_for_as_many_verdicts_as_one_error_takes_are_to_be_renewed() -> None:
    roles = {"base": scores(3.0), "shadow": scores(1.0)}
    told = [judge(Probe(roles, {}), ShadowSection(), Look(number, 1)).reasons[-1] for number in (39, 40)]
    assert "give other held-out examples" not in told[0]
    assert told[1].startswith("held-out: 40 verdicts were by these examples, about as many as one error in 40 allows")


def test_what_answers_users_is_no_part_of_the_looks_that_reject() -> None:
    roles = {"base": scores(2.0), "shadow": scores(2.1, seed=1, noise=0.05)}
    assert judge(Probe(roles, {}), ShadowSection(), Look(50, 50)).decision == "reject"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_a_number_is_worse_than_any(value: float) -> None:
    found = verdict(spoilt(scores(0.1), value))
    assert found.decision == "reject"
    assert found.reasons == ("held-out: the loss of the shadow is not a finite number on 1 of 64 examples",)
    found = guarded(spoilt(scores(0.1), value), scores(1.0))
    assert found.decision == "reject"
    assert found.reasons[0].startswith("guard triage: the loss of the shadow is not a finite number")
    few = verdict(cut(spoilt(scores(0.1), value), 5), cut(scores(2.0), 5))
    assert few.decision == "reject", "for that one example is enough"


def test_nothing_is_concluded_from_what_answers_users_if_its_own_loss_is_not_a_number() -> None:
    found = verdict(scores(1.0), spoilt(scores(2.0), float("nan")))
    assert found.decision == "keep"
    assert found.reasons == ("held-out: the loss of live is not a finite number on 1 of 64 examples",)


def test_the_same_evidence_gives_the_same_verdict() -> None:
    state = np.random.get_state()[1].tolist()  # type: ignore[index,union-attr]
    verdicts = {verdict(scores(1.97, seed=5, noise=0.3)) for _ in range(3)}
    assert len(verdicts) == 1
    assert np.random.get_state()[1].tolist() == state, "nor is numpy's own generator drawn from"  # type: ignore[index,union-attr]


def test_a_version_that_is_no_better_is_promoted_as_seldom_as_the_confidence_says() -> None:
    promoted = sum(verdict(scores(2.0, seed=seed, noise=0.2)).decision == "promote" for seed in range(100))
    assert promoted <= 100 * 0.025 + 3 * (100 * 0.025 * 0.975) ** 0.5


def test_scores_are_read_back_as_they_were_written_and_never_shown(tmp_path: Path) -> None:
    found = spoilt(scores(2.0, exact=5), float("nan"))
    found.write(tmp_path / "scores.npy")
    read = Scores.read(tmp_path / "scores.npy")
    assert np.array_equal(read.loss, found.loss, equal_nan=True)
    assert (read.tokens.tolist(), read.exact.tolist()) == (found.tokens.tolist(), found.exact.tolist())
    assert repr(read) == "Scores()"
