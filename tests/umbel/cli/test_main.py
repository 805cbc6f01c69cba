"""The commands an operator types, each in a process of its own: one clear line, exit status 1, never a traceback."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from client.journal import Journal
from tests.client.test_journal import make_live
from umbel.adapter import AdapterRef

SITE = """
[site]
name = "clinic-a"
state_dir = "state"
[model]
path = "base"
[[adapter]]
name = "support"
[engine]
port = 30000
[training]
data = "train.jsonl"
"""


@pytest.fixture
def site_file(sockets: Path) -> Path:
    """A site file to which nothing is missing, in a folder with a short path."""
    (sockets / "base").mkdir()
    (sockets / "base" / "config.json").write_text('{"model_type": "llama"}')
    for file in ("model.safetensors", "tokenizer.json"):
        (sockets / "base" / file).write_text("")
    (sockets / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (sockets / "site.toml").write_text(SITE)
    return sockets / "site.toml"


def umbel(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("UMBEL_")}
    command = [sys.executable, "-m", "umbel.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def refusal(*arguments: str | Path) -> str:
    """What a command that fails says: on stderr only, after `umbel: `."""
    ended = umbel(*arguments)
    assert ended.returncode == 1, ended
    assert ended.stdout == ""
    assert ended.stderr.startswith("umbel: ")
    assert "Traceback" not in ended.stderr
    return ended.stderr.removeprefix("umbel: ").removesuffix("\n")


def test_check_prints_a_good_file_as_it_is_understood(site_file: Path) -> None:
    ended = umbel("check", site_file)
    assert (ended.returncode, ended.stderr) == (0, "")
    understood = json.loads(ended.stdout)
    assert understood["site"]["state_dir"] == str(site_file.parent / "state")
    assert understood["engine"]["dtype"] == "bfloat16"
    assert not (site_file.parent / "state").exists(), "checking makes nothing"


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


@pytest.mark.parametrize("command", ["check", "serve", "status", "rollback", "promote"])
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
    assert said.startswith(f"{site_file.parent}/state/site.sock: nobody answers")
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


@pytest.mark.parametrize("arguments", [["ls"], ["ls", "--json"], ["show", "support@v1"]])
def test_a_registry_that_is_not_there_is_named_and_not_made(tmp_path: Path, arguments: list[str]) -> None:
    said = refusal("adapter", *arguments, "--registry", tmp_path / "registry")
    assert said.startswith(f"{tmp_path / 'registry'}: no adapter registry here")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [["--help"], ["serve", "--help"], ["status", "--help"], ["adapter", "ls", "--help"]]
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys\nfrom umbel.cli.main import app\n"
        f"try:\n    app({arguments!r})\nexcept SystemExit as end:\n    assert end.code in (0, None), end\n"
        "heavy = {'torch', 'flwr', 'sglang', 'httpx', 'transformers', 'zmq', 'client', 'server', 'serving'}\n"
        "print('imported:', *sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stderr == "imported:\n"
    assert "Usage" in ended.stdout


@pytest.mark.parametrize("arguments", [["serv"], ["check"], ["adapter", "show"]])
def test_a_command_that_is_wrong_shows_how_it_is_used(arguments: list[str]) -> None:
    ended = umbel(*arguments)
    assert ended.returncode == 2
    assert "Usage:" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "train.jsonl: holds no example; expected a JSON object with"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', "train.jsonl:2: no kind of example; expected"),
        ('{"prompt": "a"', "train.jsonl:1: not JSON (Expecting ',' delimiter"),
        ('{"prompt": "a", "completion": ""}', "train.jsonl:1: the answer is empty; write one or remove the line"),
    ],
)
def test_check_reads_the_first_examples(site_file: Path, content: str, says: str) -> None:
    (site_file.parent / "train.jsonl").write_text(content)
    assert says in refusal("check", site_file)


def test_check_names_all_files_that_are_missing_at_once(site_file: Path) -> None:
    (site_file.parent / "base" / "tokenizer.json").unlink()
    (site_file.parent / "train.jsonl").unlink()
    lines = refusal("check", site_file).splitlines()
    assert [line.removeprefix("umbel: ").partition(": ")[0] for line in lines] == ["[model].path", "[training].data"]


def test_a_folder_for_the_bundle_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert refusal("bundle", tmp_path / "file") == f"{tmp_path / 'file'} is a file; choose a new folder"
