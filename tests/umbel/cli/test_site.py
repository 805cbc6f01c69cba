"""Commands of a site, each in a process of its own: one clear line, exit status 1, never a traceback."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from client.journal import Journal
from tests.toys.command_line import refusal, umbel
from tests.toys.sites.journal import make_live
from umbel.adapter import AdapterRef
from umbel.site.template import site_toml

SITE = site_toml()


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


def test_check_prints_a_good_file_as_it_is_understood(site_file: Path) -> None:
    ended = umbel("check", site_file, "--json")
    assert ended.returncode == 0
    assert ended.stderr.startswith("will bite: "), "only JSON on stdout, so that programs can read it"
    understood = json.loads(ended.stdout)
    assert understood["site"]["state_dir"] == str(site_file.parent / "state")
    assert understood["engine"]["dtype"] == "bfloat16"
    assert not (site_file.parent / "state").exists(), "checking makes nothing"


def write_examples(path: Path, number: int) -> None:
    path.write_text("".join(json.dumps({"prompt": str(n), "completion": "b"}) + "\n" for n in range(number)))


def test_check_ends_with_one_line_that_a_person_can_read(site_file: Path) -> None:
    folder = site_file.parent
    write_examples(folder / "train.jsonl", 1200)
    write_examples(folder / "eval.jsonl", 133)
    write_examples(folder / "triage.jsonl", 30)
    guard = '[[shadow.guard]]\nname = "triage"\ndata = "triage.jsonl"\n'
    site_file.write_text(SITE + 'eval_data = "eval.jsonl"\n' + guard)
    ended = umbel("check", site_file)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == (
        f"ok: clinic-a, base base at {folder}/base, adapter support, 1,200 training and 133 held-out examples, "
        "guard triage with 30\n"
    )
    ended = umbel("check", site_file, "--json")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert json.loads(ended.stdout)["training"]["eval_data"] == f"{folder}/eval.jsonl"


def test_check_counts_the_share_that_is_held_out_of_the_data(site_file: Path) -> None:
    write_examples(site_file.parent / "train.jsonl", 600)
    site_file.write_text(SITE + "eval_fraction = 0.2\n")
    found = re.search(r"([0-9]+) training and ([0-9]+) held-out examples\n$", umbel("check", site_file).stdout)
    assert found is not None
    train, held_out = map(int, found.groups())
    assert train + held_out == 600
    assert 80 < held_out < 160


def test_check_says_what_will_keep_every_version_from_being_promoted(site_file: Path) -> None:
    folder = site_file.parent
    write_examples(folder / "train.jsonl", 50)
    write_examples(folder / "eval.jsonl", 12)
    write_examples(folder / "triage.jsonl", 3)
    guard = '[[shadow.guard]]\nname = "triage"\ndata = "triage.jsonl"\n'
    site_file.write_text(SITE + 'eval_data = "eval.jsonl"\n' + guard)
    ended = umbel("check", site_file)
    assert (ended.returncode, ended.stderr) == (0, ""), "it can be served all the same"
    few = "are fewer than [shadow].min_examples = 30: no version can be promoted; give"
    assert ended.stdout.splitlines() == [
        f"will bite: 12 held-out examples {few} more eval_data or lower it",
        f"will bite: 3 examples of guard triage {few} it more or lower it",
    ]
    site_file.write_text(SITE)
    (line,) = umbel("check", site_file).stdout.splitlines()
    assert line.endswith("give more data, or eval_data, or lower it")


def test_check_reads_every_line(site_file: Path) -> None:
    write_examples(site_file.parent / "train.jsonl", 150)
    with (site_file.parent / "train.jsonl").open("a") as file:
        file.write("no JSON\n")
    assert "train.jsonl:151: not JSON" in refusal("check", site_file)


@pytest.mark.parametrize("command", ["check", "serve", "status", "rollback", "examples"])
def test_help_ends_with_calls_to_copy(command: str) -> None:
    shown = umbel(command, "--help").stdout
    assert shown.partition("Examples:")[2].count(f"umbel {command} ") >= 2


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
