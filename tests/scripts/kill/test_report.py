"""The kill matrix's table in docs/operations.md: a run replaces the rows of what it tried anew, and nothing else."""

from pathlib import Path

import pytest

from scripts.tools.kill.report import BEGIN, END, Row, read, write


def test_deaths_that_were_not_tried_this_time_stay(tmp_path: Path) -> None:
    page = tmp_path / "operations.md"
    page.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    write(page, [Row("swept", "site", True, 44.0, "v1"), Row("load.done", "engine", True, 31.0, "v1")], 9)
    write(page, [Row("swept", "site", False, 3.0, "v1"), Row("publish.listed", "ServerApp", True, 1.0, "v1")], 9)
    content = page.read_text()
    assert content.startswith(f"before\n{BEGIN}\nRecovered 2 of 3; 3 of 9 deaths were tried.\n")
    assert content.endswith(f"{END}\nafter\n")
    assert "| `swept` |  | **no**, 3 s |  |" in content
    assert sorted(read(content), key=lambda row: row.killed) == [
        Row("publish.listed", "ServerApp", True, 1.0), Row("load.done", "engine", True, 31.0),
        Row("swept", "site", False, 3.0),
    ]  # fmt: skip


def test_a_page_without_the_markers_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "operations.md"
    page.write_text("no table")
    with pytest.raises(ValueError, match="expected the lines"):
        write(page, [Row("swept", "site", True, 44.0)], 9)
    assert page.read_text() == "no table"
