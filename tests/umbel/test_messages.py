"""Messages between centre and site: their bounds, and the values that are derived from them."""

import json
import math
from typing import Any

import pytest
from pydantic import ValidationError

from umbel import wire
from umbel.adapter import Personal
from umbel.base.fingerprint import BaseFingerprint
from umbel.errors import WireError
from umbel.messages import Evaluation, Hello, JobState, RoundOrder, RoundReport, TrainPlan, Verdict
from umbel.statements import UpdateStatement

PLAN = TrainPlan(rank=8, steps=1, seconds=1.0)


@pytest.mark.parametrize(("accepted", "decision"), [(True, "promote"), (False, "reject")])
def test_a_verdict_of_an_older_journal_is_read_as_what_it_meant(accepted: bool, decision: str) -> None:
    assert Verdict.model_validate({"accepted": accepted, "reasons": []}).decision == decision


@pytest.mark.parametrize(("accepted", "decision"), [(True, "keep"), (True, "reject"), (False, "promote")])
def test_a_verdict_has_one_meaning(accepted: bool, decision: str) -> None:
    with pytest.raises(WireError, match="yet the decision is"):
        wire.unpack_model(wire.pack("Verdict", {"accepted": accepted, "reasons": [], "decision": decision}), Verdict)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"rank": 0}, "rank"),
        ({"seconds": math.inf}, "seconds"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"factors": "BA"}, "factors"),
        ({"epochs": 1}, "epochs"),
    ],
)
def test_a_plan_that_no_site_could_carry_out_is_refused(change: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError, match=rf"(?m)^{field}$"):
        TrainPlan.model_validate({**PLAN.model_dump(), **change})


def test_the_joined_rank_is_that_of_both_parts() -> None:
    own = Personal(part="adapter", rank=4)
    assert (PLAN.joined_rank, PLAN.model_copy(update={"personal": own}).joined_rank) == (8, 12)


@pytest.mark.parametrize("key", ["", "a b", "../x", "k" * 81, "k\n"])
def test_a_round_key_is_fit_to_be_a_file_name(key: str) -> None:
    with pytest.raises(ValidationError, match="key"):
        RoundOrder(key=key, base="b", parent="p", round=1, plan=PLAN)


ORDER = RoundOrder(key="k", base="b", parent="p", round=1, plan=PLAN)
BASE = BaseFingerprint(weights="w", config="c", quantization="q", tokenizer="t", chat_template="x")
HELLO = Hello(
    site="a", adapter="support", fingerprint=BASE, shapes={"q_proj": (6, 5)}, dtype="float32", max_lora_rank=4,
    train_examples=1, eval_examples=1,
)  # fmt: skip


@pytest.mark.parametrize("said", [ORDER, HELLO], ids=["order", "hello"])
def test_what_says_nothing_of_kin_is_written_as_by_earlier_releases_and_read_back(said: RoundOrder | Hello) -> None:
    assert not {"kin", "packing"} & json.loads(said.model_dump_json()).keys()
    assert type(said).model_validate_json(said.model_dump_json()) == said
    kin = said.model_copy(update={"kin": "1" * 64})
    assert type(said).model_validate_json(kin.model_dump_json()) == kin
    assert wire.unpack_model(wire.pack_model(kin), type(said)) == kin


@pytest.mark.parametrize("kin", ["1", "1" * 63, "A" * 64, "../" + "1" * 61, "1" * 64 + "\n"])
def test_kin_is_a_digest_or_empty(kin: str) -> None:
    with pytest.raises(ValidationError, match="kin"):
        RoundOrder.model_validate({**ORDER.model_dump(), "kin": kin})
    with pytest.raises(ValidationError, match="kin"):
        Hello.model_validate({**HELLO.model_dump(), "kin": kin})


def test_a_loss_that_is_no_number_survives_json() -> None:
    report = RoundReport(key="k", state=JobState.DONE, parent="p", loss_sum=math.nan)
    assert math.isnan(RoundReport.model_validate_json(report.model_dump_json()).loss_sum)


def test_means_are_those_of_the_sums_and_of_nothing_they_are_nan() -> None:
    measured = Evaluation(loss_sum=6.0, loss_tokens=4, exact=1, examples=2)
    assert (measured.loss, measured.exact_match) == (1.5, 0.5)
    nothing = Evaluation(loss_sum=0.0, loss_tokens=0, exact=0, examples=0)
    assert math.isnan(nothing.loss)
    assert math.isnan(nothing.exact_match)


def test_a_statement_is_of_the_report_without_its_signature() -> None:
    report = RoundReport(key="k", state=JobState.DONE, parent="p", signature="0" * 128)
    assert UpdateStatement.of("a", ORDER, report).report == report.model_copy(update={"signature": ""})


def test_states_of_a_job_that_are_final() -> None:
    assert [state for state in JobState if state.final] == ["done", "skipped", "failed", "cancelled"]
