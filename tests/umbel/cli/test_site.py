"""Commands of a site, each in a process of its own: one clear line, exit status 1, never a traceback."""

import importlib.util
import json
import socket
from pathlib import Path

import pytest

from client.journal import Journal
from tests.toys.command_line import refusal, umbel
from tests.toys.sites.base_dir import write_base
from tests.toys.sites.journal import make_live
from umbel.adapter import AdapterRef
from umbel.cli.daemon import ask
from umbel.errors import ConfigError
from umbel.site.config import SiteConfig
from umbel.site.template import site_toml

SITE = site_toml()


@pytest.fixture
def site_file(sockets: Path) -> Path:
    """A site file to which nothing is missing, in a folder with a short path."""
    write_base(sockets / "base")
    (sockets / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (sockets / "site.toml").write_text(SITE)
    return sockets / "site.toml"


@pytest.mark.parametrize("command", ["check", "data", "serve", "status", "rollback", "examples"])
def test_help_ends_with_calls_to_copy(command: str) -> None:
    shown = umbel(command, "--help").stdout
    assert shown.partition("Examples:")[2].count(f"umbel {command} ") >= 2


def test_check_names_all_files_that_are_missing_at_once(site_file: Path) -> None:
    (site_file.parent / "base" / "tokenizer.json").unlink()
    (site_file.parent / "train.jsonl").unlink()
    lines = refusal("check", site_file).splitlines()
    assert [line.removeprefix("umbel: ").partition(": ")[0] for line in lines] == [
        f"{site_file.parent}/base",
        "[training].data",
    ]


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("port =", "prot =", "site.toml: engine.prot is not a setting; did you mean 'port'?"),
        ("port = 30000", 'port = "many"', "site.toml: engine.port: Input should be a valid integer"),
        ("[engine]", "[engine", "site.toml: not TOML: "),
        ('"base"', '"elsewhere"', "elsewhere: no base model here; expected a Hugging Face model directory"),
        ('"train.jsonl"', '"tarin.jsonl"', "tarin.jsonl does not exist; point it to a JSONL file"),
    ],
)
@pytest.mark.parametrize("command", ["check", "serve"])
def test_a_mistake_in_the_file_is_said_in_one_line_each(
    site_file: Path, command: str, old: str, new: str, line: str
) -> None:
    if command == "serve" and not importlib.util.find_spec("sglang"):
        pytest.skip("needs the engine's environment")
    site_file.write_text(SITE.replace(old, new, 1))
    lines = refusal(command, site_file).splitlines()
    assert any(line in said for said in lines), lines
    assert len(lines) == (2 if new == "prot =" else 1), "a misspelt key is also a missing one"


@pytest.mark.parametrize("command", ["check", "data", "serve", "status", "rollback", "promote"])
def test_a_missing_file_is_named_by_every_command(tmp_path: Path, command: str) -> None:
    more = {"rollback": ["support"], "promote": ["support@v3"]}.get(command, [])
    assert refusal(command, tmp_path / "site.toml", *more) == (
        f"{tmp_path / 'site.toml'}: cannot be read (No such file or directory)"
    )


def test_a_model_of_another_family_is_refused_by_name(site_file: Path) -> None:
    (site_file.parent / "base" / "config.json").write_text('{"model_type": "gpt2"}')
    assert "model_type 'gpt2' is not supported; known: llama, mistral" in refusal("check", site_file)


def test_a_model_with_a_broken_config_is_said_in_one_line(site_file: Path) -> None:
    (site_file.parent / "base" / "config.json").write_text("{")
    assert "config.json" in refusal("check", site_file)


@pytest.mark.skipif(bool(importlib.util.find_spec("sglang")), reason="for the environment without SGLang")
def test_serve_in_flowers_environment_says_which_one_is_needed(site_file: Path) -> None:
    said = refusal("serve", site_file)
    assert "belongs to the other environment, the one with umbel[site]: .venv-engine" in said


@pytest.mark.parametrize("arguments", [["status"], ["status", "--json"], ["rollback"], ["promote"]])
def test_a_site_that_nobody_serves_says_so(site_file: Path, arguments: list[str]) -> None:
    more = {"rollback": ["support"], "promote": ["support@v3"]}.get(arguments[0], [])
    said = refusal(*arguments, site_file, *more)
    assert said.startswith(f"{site_file.parent}/state/operator.sock: nobody answers")
    assert said.endswith("is `umbel serve` running?")


def test_the_journal_answers_for_a_daemon_that_is_gone(site_file: Path) -> None:
    state = site_file.parent / "state"
    state.mkdir()
    journal = Journal(state / "journal.sqlite3")
    make_live(journal, AdapterRef("support", 1))
    journal.close()
    ended = umbel("status", site_file)
    assert (ended.returncode, ended.stderr) == (1, "")
    assert f"To start it: umbel serve {site_file}" in " ".join(ended.stdout.split())
    assert "support: support@v1 will answer users, since " in ended.stdout
    ended = umbel("status", site_file, "--json")
    assert ended.returncode == 1
    assert json.loads(ended.stdout)["running"] is False
    assert json.loads(ended.stdout)["aliases"]["support"]["live"] == "support@v1"


@pytest.mark.skipif(not importlib.util.find_spec("httpx"), reason="needs httpx")
def test_a_daemon_that_is_late_may_still_do_it_and_is_not_taken_for_none(site_file: Path) -> None:
    state = site_file.parent / "state"
    state.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(state / "operator.sock"))
        listener.listen()
        with pytest.raises(ConfigError, match=r"did not answer within .* and may still do it; see `umbel status`"):
            ask(SiteConfig.load(site_file), "POST", "/adapters/support/rollback", 0.05)
