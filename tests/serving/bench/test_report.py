"""The page of a run: its tables, and the part of the page that is replaced."""

from pathlib import Path

import pytest

from serving.bench import report
from tests.toys.serving.blocks import request, results, run
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
    assert text.count("\n| ") == 1 + len(("inference", "partition", "unpaced_equal", "ours"))
    assert "| umbel | 1.000 | 50 / 50 / 50 | 10 / 10 / 10 | 30 | 1.00 / 1.00 | 10.00 | 5.00 | 0.00 | 60 | 0.60" in text
