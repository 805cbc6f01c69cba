"""The figures of the swap benchmark, from answers that are made up: windows, ratios, growth, and the exit status."""

import math

import pytest

from scripts.tools.bench.swap import Swaps, growth, ratio, show, ttfts
from scripts.tools.bench.swap_users import Answer, Users


def stream(at: float, ttft: float, *, kind: str = "stream", trouble: str = "", text: str = "x") -> Answer:
    return Answer(kind, "p", at, "support@v1", at + ttft, ((at + 1, 0.2),), (text,), trouble)


def test_a_window_has_the_good_streams_that_were_due_in_it() -> None:
    answers = [stream(1.0, 0.5), stream(2.0, 0.7), stream(3.0, 0.9), stream(1.5, 1, kind="long"),
               stream(1.5, 1, trouble="status 500")]  # fmt: skip
    assert ttfts(answers, 1.0, 3.0) == [pytest.approx(0.5), pytest.approx(0.7)]


def test_the_ratio_compares_all_cycles_and_its_interval_holds_it() -> None:
    line = ratio([[0.1, 0.2, 0.3]] * 4, [[0.2, 0.4, 0.6]] * 4, 0.5)
    assert line == ("TTFT P50: 200.0 ms before, 400.0 ms in the 5 s after a flip: 2.000 × (2.000 to 2.000), "
                    "12 and 12 requests")  # fmt: skip


def test_growth_is_that_after_the_warm_up() -> None:
    memory = [(600.0 * i, 1000.0 + (500.0 if i < 3 else 0.0) + i) for i in range(10)]
    line = growth(memory)
    assert "1500 MB at the start, 1003 MB after warm-up, 1009 MB at the end: +6 MB per hour" in line
    assert "+nan MB per hour" in growth(memory[:2])


def swapped() -> Swaps:
    return Swaps(cycles=[0.0, 20.0], flips=[12.0, 32.0], memory=[(float(i), 100.0) for i in range(40)],
                 promotions=1, roll_backs=1)  # fmt: skip


@pytest.mark.parametrize(
    ("more", "status"),
    [
        ([], 0),
        ([stream(2.0, 0.1, trouble="status 500")], 1),
        ([stream(2.0, 0.1, text="another answer")], 1),
        ([Answer("no model", "p", 2.0, trouble="status 200")], 1),
    ],
)
def test_the_status_tells_failed_requests_and_mixed_versions(
    more: list[Answer], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = [stream(at, 0.1) for at in (1.0, 13.0, 21.0, 33.0)]
    users = Users("http://nobody", 5.0, answers=[*answers, *more])
    assert show(users, swapped(), 0.5, 5.0) == status
    out = capsys.readouterr().out
    assert out.startswith("0.5 minutes at 5 requests/s, 1 promotions, 1 roll-backs")
    assert "0 ms while a version is loaded and probed, 200 ms at other times" in out


def test_an_answer_without_a_token_has_no_time_to_its_first() -> None:
    assert math.isnan(Answer("stream", "p", 1.0).ttft)
