"""Bars are met, missed, undecided or not measured, by blocks written by hand."""

from dataclasses import replace

from serving.bench.intervals import Outcome
from serving.bench.pages import bars
from tests.toys.serving.blocks import request, results, run

ATTAINED = "SLO attainment at load 0.6, relative to inference only"


def found(ours: object = None, harvest: float = 0.6, rounds: int = 4) -> dict[str, bars.Bar]:
    blocks = [one for one in run(ours or request(), harvest) if one.round < rounds]  # type: ignore[arg-type]
    return {bar.claim: bar for bar in bars.bars(results(blocks))}


def test_bars_are_met_where_they_are_met() -> None:
    missed = [bar.claim for bar in found().values() if bar.outcome is not Outcome.MET]
    assert missed == [
        "quality goodput G_q over that of the best joint baseline measured there, in each condition (CoLLM)"
    ]
    hard, nice = [bar for claim, bar in found().items() if claim.startswith("harvest over")]
    assert hard.measured.startswith("2.00 (2.00–2.00) (0.3: 2.00 (2.00–2.00) with 1.000 attained against 0.990, ")
    assert nice.measured.startswith("1.00 (1.00–1.00) (0.3: 1.00 (1.00–1.00) with 1.000 attained against 1.000, ")


def test_two_late_requests_in_a_hundred_are_undecided_at_four_hundred_and_cost_no_harvest() -> None:
    late = found(request(ttft=9.0))
    assert late[ATTAINED].outcome is Outcome.UNKNOWN
    assert late[ATTAINED].measured.startswith("0.980 (0.96")
    assert late["the same, at best"].measured == "2.00 (2.00–2.00)"


def test_few_requests_are_not_enough_to_tell() -> None:
    few = found(rounds=3)[ATTAINED]
    assert few.outcome is Outcome.UNKNOWN
    assert "by 300 requests; it takes 368 to tell; 1.000 (1.000–1.000) by 3 rounds" in few.measured


def test_one_round_decides_nothing() -> None:
    one = found(rounds=1)
    estimated = [bar for bar in one.values() if not bar.claim.startswith("preemption")]
    assert {bar.outcome for bar in estimated} == {Outcome.UNKNOWN}


def test_tokens_that_were_not_equal_are_said_in_the_claim() -> None:
    blocks = [replace_tokens(one, 45_000) if one.system == "unpaced_equal" else one for one in run(request(), 0.6)]
    claims = [bar.claim for bar in bars.bars(results(blocks))]
    assert any("unpaced colocation that trains 0.75 (0.75–0.75) of our tokens" in claim for claim in claims)


def replace_tokens(block: bars.Block, tokens: int) -> bars.Block:
    return block.model_copy(update={"tokens": tokens})


def test_longer_waits_than_a_quantum_are_counted() -> None:
    blocks = list(run(request(), 0.6))
    slow = [
        one.model_copy(update={"preemption": one.preemption.model_copy(update={"p99_s": 0.009, "longest_s": 0.009})})
        if one.preemption
        else one
        for one in blocks
    ]
    by_claim = {bar.claim: bar for bar in bars.bars(results(slow))}
    waits = by_claim["preemption latency P99, at most one P99 quantum"]
    assert waits.measured == "20 to 100 of 2000 requests waited longer, the longest 9.0 ms"
    assert waits.outcome is Outcome.UNKNOWN


def test_what_was_not_run_is_not_judged() -> None:
    nothing = replace(results([]))
    assert {bar.outcome for bar in bars.bars(nothing)} == {Outcome.UNMEASURED}
