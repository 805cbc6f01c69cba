"""Bars are met, missed or not measured, by blocks written by hand."""

from serving.bench import bars
from tests.toys.serving.blocks import request, results, run


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
