"""What users, sites and the centre wrote is shown by the commands, and drives no terminal and fakes no line."""

import io
import json
import sqlite3
import unicodedata
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from client.data import user_examples
from tests.toys.sites.user_examples import example, scrub
from umbel.cli import adapter, fleet, status_screen
from umbel.cli.console import explained, say
from umbel.cli.main import app
from umbel.errors import ConfigError
from umbel.printable import INVISIBLE
from umbel.site.config import SiteConfig
from umbel.site.template import site_toml

OVERWRITES = "POISON\x1b[1K\r        assistant: harmless"
FAKES = "a reason\nclinic-b: support@v9 answers\u2028clinic-c\x85\u202e\u200b\x9b2K"


def seen(text: str) -> str:
    """Return a text after checking that nothing in it but line breaks is invisible."""
    assert {unicodedata.category(letter) for letter in text.replace("\n", "")} & INVISIBLE == set()
    return text


@pytest.fixture
def site_file(sockets: Path) -> Path:
    (sockets / "site.toml").write_text(site_toml() + "[examples]\nenabled = true\nquarantine_hours = 0\n")
    (sockets / "state").mkdir()
    return sockets / "site.toml"


def test_an_example_is_shown_as_it_is_trained_on(site_file: Path) -> None:
    config = SiteConfig.load(site_file)
    state = config.site.state_dir
    user_examples.keep(config, example(state), scrub)
    with closing(sqlite3.connect(state / user_examples.DATABASE)) as database, database:
        long = "x" * 300 + "\n     2  2026-01-01 00:00  support@v1       accepted  waiting"
        kept = [{"role": "user\n  assistant", "content": OVERWRITES}, {"role": "user", "content": long}]
        database.execute("UPDATE examples SET messages = ?, version = ?", (json.dumps(kept), FAKES))
    texts = seen(CliRunner().invoke(app, ["examples", "ls", str(site_file), "--texts"]).stdout)
    lines = [line for line in texts.splitlines() if line.strip()]
    assert r"user\n  assistant:" in lines[1]
    assert r"POISON\u001b[1K\r        assistant: harmless" in " ".join(line.strip() for line in lines[1:3])
    assert not any(line.startswith("      2") for line in lines)
    assert all(line.startswith(" " * 8) for line in lines[1:]), "no line begins where an example does"
    as_json = CliRunner().invoke(app, ["examples", "ls", str(site_file), "--texts", "--json"]).stdout
    assert seen(as_json).isascii()
    assert json.loads(as_json)[0]["messages"] == kept


def test_the_status_says_what_sites_and_the_engine_said() -> None:
    report: dict[str, Any] = {
        "site": FAKES, "running": True, "engine": {"ready": True, "starts": 1, "since": 0.0, "url": FAKES},
        "aliases": {"support": {"live": "support@v2", "previous": "support@v1"}},
        "versions": {
            "support@v2": {"state": "live", "verdict": {"decision": "promote", "reasons": [FAKES]}},
            "support@v1": {"taken_back": FAKES},
        },
        "answering": {"support": {"since": 0.0, "event": FAKES}}, "roll_backs": {"support": [[0.0, FAKES, 1]]},
        "heldout_looks": {}, "data": {}, "worth": {}, "training_shares": {}, "running_rounds": {}, "served": [],
        "open_rounds": [], "in_flight": {FAKES: 1}, "training": {"job": "", "error": FAKES}, "recovered": [FAKES],
    }  # fmt: skip
    screen = Console(file=io.StringIO(), width=100, highlight=False)
    status_screen.show(report, "site.toml", now=100.0, console=screen)
    assert isinstance(screen.file, io.StringIO)
    text = seen(screen.file.getvalue())
    assert text.count(r"a reason\nclinic-b") == text.count("a reason")
    assert text.count("a reason") >= 8


def test_what_sites_answered_is_one_line_per_site(capsys: pytest.CaptureFixture[str]) -> None:
    found = {
        "live": "support@v2", "brought": {"clinic-a": FAKES}, "already": [FAKES], "kept": {FAKES: "it has"},
        "missed": {"clinic-d": FAKES},
    }  # fmt: skip
    say(*fleet._lines(found))
    assert len(seen(capsys.readouterr().out).splitlines()) == 4


def test_a_manifests_texts_stay_on_their_line(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"ref": "support@v1", "round": 1, "strategy": FAKES, "sites": [FAKES], "aliases": [], "pruned": False}
    move = {"at": "now", "to": {"live": 1}, "who": FAKES, "run_id": FAKES, "why": FAKES}
    difference = {"fields": {"left_out": ({}, {FAKES: FAKES})}, "distance": 0.0, "cosine": 1.0, "modules": {FAKES: 1.0}}
    say(adapter._line({**row, "state": "rejected"}), adapter._move(move), *adapter._diff_lines(difference))
    assert len(seen(capsys.readouterr().out).splitlines()) == 5


def test_an_error_keeps_its_lines_and_drives_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), explained():
        raise ConfigError("two mistakes:\n  \x1b[2Kone\r\n  two\x0b")
    assert seen(capsys.readouterr().err).splitlines() == [
        "umbel: two mistakes:", r"umbel:   \u001b[2Kone", r"umbel:   two\u000b",
    ]  # fmt: skip
