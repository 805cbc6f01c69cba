"""The page of a run: its tables, and the part of the page that is replaced."""

from pathlib import Path

import pytest

from serving.bench.pages import report
from tests.toys.serving.blocks import block, request, results, run
from umbel.errors import ConfigError


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
    assert text.count("\n| ") == 1 + len(("inference", "partition", "hard", "unpaced_equal", "ours"))
    row = (
        "| umbel | 1.000 (0.991–1.000) | 50 / 50 / 50 | 10 / 10 / 10 | 30 | 1.00 / 1.00 | 10.00 | 5.00 | 0.00 | 6000 |"
    )
    assert row in text
    assert "| B5 at most umbel's tokens: 1.00 (1.00–1.00) of them |" in text


def test_p99_of_few_requests_is_called_the_largest() -> None:
    assert report._quantiles([0.01] * 59 + [0.154]) == "10 / 10 / max 154"
    assert report._interference([0.02] * 60, [0.01] * 200) == "max 2.00"


def test_a_choice_within_noise_of_another_setting_is_said_to_be_so() -> None:
    runs = [
        block("stop", *[request()] * good, *[request(ttft=9.0)] * (22 - good), phase="tune", options={"steps": steps})
        for steps, good in ((1.0, 20), (2.0, 18), (4.0, 2))
    ]
    text = report._tuning_table(results(runs))
    assert "| yes, within noise of steps 2 |" in text


def test_where_the_cores_time_went_is_told_of_umbel_and_of_both_partitions() -> None:
    text = report._core_table(results([one for one in run(request(), harvest=0.6) if one.condition in ("0.3", "none")]))
    assert text.splitlines()[-3:] == [
        "| 0.3 | umbel | 0.200 | 0.600 | 0.020 | 0.030 | 0.150 | 0.010 | 0.950 | 0.750 (0.750–0.750) |",
        "| 0.3 | B3 nice partition | 0.200 | 0.600 | – | 0.010 | 0.190 | – | 0.950 | 0.750 (0.750–0.750) |",
        "| 0.3 | B6 hard partition | 0.200 | 0.300 | – | 0.000 | 0.500 | – | 0.950 | 0.375 (0.375–0.375) |",
    ]


def test_first_tokens_are_told_with_training_off_and_on() -> None:
    off, on = [request(ttft=0.04)] * 20, [request(ttft=0.05)] * 20
    blocks = [block("inference", *off), block("ours", *on), block("hard", condition="0.3")]
    text = report._first_tokens_table(results(blocks))
    assert text.splitlines()[-1] == "| 0.6 | 40 / 50 | 40 / 50 |"
