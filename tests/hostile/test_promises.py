"""docs/security.md: every promise has a number, every number names the tests that prove it, and each of them exists."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from scripts.tools.repository import REPOSITORY

TESTS = REPOSITORY / "tests"
PAGE, _, PROOFS = (REPOSITORY / "docs" / "security.md").read_text().partition("\n## What proves it\n")
NUMBER = re.compile(r"\[([A-Z]\d+)\]")
NAMED = re.compile(r"`([\w./-]*)::(\w+)`")


def rows(text: str, width: int) -> list[list[str]]:
    """Return the cells of every row of tables that have `width` columns, without heads and rules."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and line.endswith("|")]
    cells = [[cell.strip() for cell in line[1:-1].split(" |")] for line in lines]
    return [row for row in cells if len(row) == width]


def proofs() -> dict[str, list[tuple[str, str]]]:
    """Return number → the tests that are named for it, each by file and function."""
    found: dict[str, list[tuple[str, str]]] = {}
    for number, tests, _ in rows(PROOFS, 3):
        file, named = "", []
        for path, function in NAMED.findall(tests):
            file = path or file
            named.append((file, function))
        assert number not in found, f"{number} is there twice"
        found[number] = named
    return {number: named for number, named in found.items() if re.fullmatch(r"[A-Z]\d+", number)}


@cache
def functions(file: str) -> frozenset[str]:
    return frozenset(one.name for one in ast.parse((TESTS / file).read_text()).body if isinstance(one, ast.FunctionDef))


@pytest.mark.parametrize("number", proofs())
def test_a_test_that_is_named_exists(number: str) -> None:
    assert proofs()[number], f"{number} names no test"
    for file, function in proofs()[number]:
        assert (TESTS / file).is_file(), file
        assert function in functions(file), f"{file}::{function}"


def test_every_number_is_a_promise_and_has_its_proof() -> None:
    assert sorted(set(NUMBER.findall(PAGE))) == sorted(proofs())


def test_everything_that_a_party_cannot_do_has_a_number() -> None:
    table = PAGE.partition("\n## Who can do what\n")[2].partition("\n- **Two sockets.**")[0]
    parties = [row for row in rows(table, 4) if row[0] != "party"]
    assert len(parties) > 12
    for party, _, cannot, by in parties:
        assert by, party
        for one in cannot.split(";"):
            assert NUMBER.search(one), f"{party}: {one}"


def test_every_setting_has_a_number() -> None:
    lines = PAGE.partition("\n## Settings\n")[2].partition("\n`scripts/make_certs`")[0]
    settings = [row for row in rows(lines, 2) if row[0] != "setting"]
    assert len(settings) >= 10
    for setting, does in settings:
        assert NUMBER.search(does), setting


def test_a_test_that_is_missing_is_found() -> None:
    assert Path(__file__).name not in {file for named in proofs().values() for file, _ in named}
    assert "test_a_test_that_is_missing_is_found" in functions("hostile/test_promises.py")
    assert "test_of_another_name" not in functions("hostile/test_promises.py")
