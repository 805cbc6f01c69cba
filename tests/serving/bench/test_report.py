"""What blocks are worth, which settings are taken, and what the page says of the bars: from blocks written by hand."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from serving.bench import bars, report
from serving.bench.metrics import (
    Block,
    Publication,
    Request,
    Setting,
    attainment,
    gain_goodput,
    goodput,
    paired_ratio,
    publish_lags,
    quality_goodput,
    quantile,
    values,
)
from serving.bench.plan import FULL, SYSTEMS, Spec, interleaved, strict, tuned, workload
from serving.bench.trace import Trace
from serving.cotrainer.governor import Slo
from serving.trainer_socket import PreemptionStats
from umbel.errors import ConfigError

SLO = Slo(ttft_s=0.1, tpot_s=0.02)


def request(ttft: float | None = 0.05, tpot: float | None = 0.01, **more: Any) -> Request:
    return Request(**{"at": 0.0, "ttft": ttft, "tpot": tpot, "longest_gap": 0.03, "tokens": 5, "version": "", **more})


def block(system: str = "ours", *requests: Request, **more: Any) -> Block:
    fields: dict[str, Any] = {"phase": "measure", "condition": "0.6", "round": 0, "window": 10.0, **more}
    return Block(system=system, requests=requests, **fields)


@pytest.mark.parametrize(
    ("one", "met"),
    [
        (request(), True),
        (request(ttft=0.1, tpot=0.02), True),
        (request(ttft=0.11), False),
        (request(tpot=0.021), False),
        (request(tpot=None), True),
        (request(ttft=None, tpot=None, error="no answer within the drain"), False),
        (request(error="3 of 5 tokens"), False),
    ],
)
def test_a_request_is_met_when_it_is_answered_in_time(one: Request, met: bool) -> None:
    assert one.met(SLO) is met
    assert goodput(block("ours", one), SLO) == met / 10


def test_attainment_is_over_all_requests_of_all_blocks() -> None:
    assert attainment([block("ours", request(), request(ttft=9.0)), block("ours", request(), request())], SLO) == 0.75


def test_a_failed_request_is_infinitely_late_in_the_quantiles() -> None:
    one = block("ours", *[request()] * 18, *[request(None, None, error="503")] * 2)
    assert quantile(values([one], "ttft"), 0.90) == 0.05
    assert math.isinf(quantile(values([one], "ttft"), 0.95))


def test_quality_counts_for_the_version_that_answered_and_only_in_time() -> None:
    quality = {"": 4.0, "better": 2.0, "worse": 5.0}
    one = block(
        "ours", request(), request(version="better"), request(version="worse"), request(ttft=9.0, version="better")
    )
    assert quality_goodput(one, SLO, quality) == pytest.approx((1 / 4 + 1 / 2 + 1 / 5) / 10)
    assert gain_goodput(one, SLO, quality) == pytest.approx(2.0 / 10)


def test_a_publish_lag_ends_with_the_first_token_for_a_user() -> None:
    served = Publication(digest="a", trained_at=1.0, live_at=1.5, first_token_at=1.75)
    never = Publication(digest="b", trained_at=2.0, live_at=2.5)
    assert publish_lags([block("ours", versions=(served, never))]) == [0.75]


def test_ratios_are_paired_by_round() -> None:
    ours = [block("ours", round=n, tokens=tokens) for n, tokens in enumerate([100, 300, 20, 7])]
    theirs = [block("training", round=n, tokens=tokens) for n, tokens in enumerate([200, 100, 10])]
    middle, low, high = paired_ratio(ours, theirs, lambda one: one.training_rate)
    assert middle == 2.0, "the median of 0.5, 3 and 2; the round without a partner does not count"
    assert (low, high) == (0.5, 3.0)
    assert math.isnan(paired_ratio(ours, [], lambda one: one.training_rate)[0])


def test_a_block_in_which_the_clients_core_was_too_busy_is_void() -> None:
    assert block("ours", cores=(1.0, 0.61)).void
    assert not block("ours", cores=(1.0, 0.59)).void


def test_the_strict_preset_is_a_multiple_of_the_medians() -> None:
    one = block("inference", request(0.01, 0.001), request(0.02, 0.002), request(0.9, None), phase="preset")
    assert (strict(one).ttft_s, strict(one).tpot_s) == pytest.approx((0.06, 0.004))


def tuning(setting: float, attained: int, tokens: int) -> Block:
    answers = [request()] * attained + [request(ttft=9.0)] * (100 - attained)
    return block("partition", *answers, phase="tune", options={"nice": setting}, tokens=tokens)


def test_the_setting_that_trains_most_within_the_targets_is_taken() -> None:
    runs = [tuning(5, 90, 900), tuning(10, 99, 500), tuning(15, 100, 300)]
    assert tuned(runs, SLO, reference=1.0) == {"partition": {"nice": 10}}


def test_where_no_setting_keeps_the_targets_the_one_that_comes_nearest_is_taken() -> None:
    assert tuned([tuning(5, 70, 900), tuning(19, 80, 100)], SLO, reference=1.0) == {"partition": {"nice": 19}}


def test_rounds_run_forth_and_back_and_equal_tokens_come_after_ours() -> None:
    systems = ("inference", "ours", "idle", "unpaced_equal")
    assert interleaved(systems, 0) == ("inference", "ours", "unpaced_equal", "idle")
    assert interleaved(systems, 1) == ("idle", "ours", "unpaced_equal", "inference")


def test_the_protocol_fits_into_42_minutes_and_tunes_every_baseline_alike() -> None:
    assert FULL.seconds() <= 42 * 60
    assert {len(SYSTEMS[system].grid) for system in FULL.tuned} == {4}
    keys = [spec.key for spec in FULL.specs()]
    assert len(keys) == len(set(keys)), "a block is found again by its key"


def test_all_systems_of_a_round_see_the_same_arrivals_and_tuning_sees_others() -> None:
    trace = Trace.fitted()

    def arrivals(phase: Any, condition: str, system: str, number: int) -> Any:
        return workload(trace, Spec(phase, condition, system, number), capacity=10.0, saturation=20.0, seconds=5.0)

    for condition in ("0.6", "square"):
        assert arrivals("measure", condition, "ours", 1) == arrivals("measure", condition, "idle", 1)
        assert arrivals("measure", condition, "ours", 1) != arrivals("measure", condition, "ours", 2)
    assert arrivals("tune", "0.6", "idle", 0) == arrivals("tune", "0.6", "stop", 3)
    assert arrivals("tune", "0.6", "idle", 1) != arrivals("measure", "0.6", "idle", 1)
    assert arrivals("measure", "none", "training", 0) == ()


def results(blocks: list[Block]) -> report.Results:
    setting = Setting(saturation=20.0, capacity=10.0, ttft_s=0.1, tpot_s=0.02, attained=1.0)
    machine = dict.fromkeys(("cpu", "cores", "memory", "sglang", "torch", "python"), "x")
    facts: dict[str, object] = {"smoke": False, "trace": None, "machine": machine}
    return report.Results(tuple(blocks), setting, {"": 2.0}, facts, 0)


def run(ours: Request, harvest: float) -> Iterator[Block]:
    """Two rounds of everything that a bar needs."""
    preemption = PreemptionStats(arrivals=10, count=5, p99_s=0.004, longest_s=0.004)
    for number in range(2):
        yield block("training", condition="none", round=number, tokens=1000)
        for condition in ("0.3", "0.6", "0.8", "1.2", "square"):
            common: dict[str, Any] = {"condition": condition, "round": number}
            trained = 0 if condition == "1.2" else int(1000 * harvest)
            yield block("inference", *[request()] * 100, **common)
            yield block("partition", *[request()] * 100, tokens=200, **common)
            yield block("ours", *[request()] * 98, ours, ours, tokens=trained, preemption=preemption,
                        longest_quantum_s=0.005, **common)  # fmt: skip
        yield block("unpaced_equal", *[request(ttft=0.5, tpot=0.05)] * 100, round=number, tokens=600)
        for server in ("umbel_off", "stock"):
            yield block(server, *[request()] * 10, phase="stock", condition="alone", round=number)


def test_bars_are_met_where_they_are_met() -> None:
    found = list(bars.bars(results(list(run(request(), harvest=0.6)))))
    missed = [bar.claim for bar in found if not bar.met]
    assert missed == ["quality goodput G_q over that of the best tuned joint baseline, in each condition (CoLLM)"]
    assert any("3.00 (0.3: 3.00, 0.6: 3.00, 0.8: 3.00, square: 3.00)" in bar.measured for bar in found)
    assert any(bar.measured.startswith("−90%") for bar in found)


def test_two_late_requests_in_a_hundred_miss_the_attainment_and_harvest_nothing() -> None:
    found = {bar.claim: bar for bar in bars.bars(results(list(run(request(ttft=9.0), harvest=0.6))))}
    attained = found["SLO attainment at load 0.6, relative to inference only"]
    assert (attained.met, attained.measured) == (False, "0.980; by rounds 0.980 (0.980–0.980)")
    assert found["the same, at best"].measured == "0.00"


def test_what_was_not_run_is_not_judged() -> None:
    assert {bar.met for bar in bars.bars(results([]))} == {None}


def test_a_void_block_is_left_out_and_counted(tmp_path: Path) -> None:
    lines = [block("ours", round=0), block("ours", round=1, cores=(1.0, 0.9))]
    (tmp_path / "blocks.jsonl").write_text("".join(one.model_dump_json() + "\n" for one in lines) + '{"cut off')
    (tmp_path / "setting.json").write_text(
        '{"saturation": 20, "capacity": 10, "ttft_s": 0.1, "tpot_s": 0.02, "attained": 1}'
    )
    (tmp_path / "run.json").write_text('{"smoke": false, "trace": null, "machine": {}}')
    found = report.read(tmp_path)
    assert ([one.round for one in found.blocks], found.void) == ([0], 1)


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no run here that has come far enough \(blocks.jsonl, "):
        report.read(tmp_path)


def test_only_what_lies_between_the_markers_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.replace_section(page, "new")
    report.replace_section(page, "newer")
    assert page.read_text() == f"before\n{report.BEGIN}\n\nnewer\n\n{report.END}\nafter\n"
    page.write_text("nothing")
    with pytest.raises(ConfigError, match=r"page\.md: expected the lines"):
        report.replace_section(page, "new")


def test_a_condition_is_a_table_of_its_systems() -> None:
    text = report._condition_table(results(list(run(request(), harvest=0.6))), "0.6")
    assert text.count("\n| ") == 1 + len(("inference", "partition", "unpaced_equal", "ours"))
    assert "| umbel | 1.000 | 50 / 50 / 50 | 10 / 10 / 10 | 30 | 1.00 / 1.00 | 10.00 | 5.00 | 0.00 | 60 | 0.60" in text


def test_a_system_of_the_plan_is_one_of_the_table() -> None:
    named = {system for systems in FULL.conditions.values() for system in systems}
    assert named | {"training"} == set(SYSTEMS)
    assert replace(FULL, rounds=0).seconds() < FULL.seconds()
