"""The benchmarks' page: a section's figures are replaced, word for word, and nothing beside them."""

import pytest

from scripts.tools.bench.all import COMMANDS, PAGE, replaced

TEXT = "before\n<!-- swap: begin -->\nold\n<!-- swap: end -->\nbetween\n<!-- demo: begin -->\n<!-- demo: end -->\n"


def test_a_section_gets_the_new_output_and_the_rest_stays() -> None:
    new = replaced(TEXT, "swap", "1 \\1 of 2\n")
    assert new == TEXT.replace("old", "```text\n1 \\1 of 2\n```"), "backslashes are text"
    assert replaced(new, "swap", "1 \\1 of 2") == new


@pytest.mark.parametrize("page", [TEXT.replace("swap: end", "x"), TEXT + TEXT])
def test_a_page_without_the_section_or_with_two_is_refused(page: str) -> None:
    with pytest.raises(ValueError, match=r"<!-- swap: begin --> … <!-- swap: end --> is there \d times"):
        replaced(page, "swap", "x")


def test_the_page_has_a_section_for_each_command_that_does_not_write_its_own() -> None:
    for name in COMMANDS.keys() - {"coexec"}:
        assert PAGE.read_text().count(f"<!-- {name}: begin -->") == 1, name
