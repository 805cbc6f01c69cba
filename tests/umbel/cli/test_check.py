"""`umbel check` reads and tokenises every example: what can be served, what will bite, and what is refused and why."""

import importlib.util
import json
import re
import shutil
import socket
from pathlib import Path

import pytest

from scripts.tools.trial_site import RANK, random_adapter
from tests.toys.command_line import refusal
from tests.toys.sites.base_dir import write_base
from tests.toys.sites.readable_site import ReadableSite
from umbel import peft_dir
from umbel.base.shapes import LINEARS
from umbel.site.template import site_toml

GUARD = {"shadow.guard": [{"name": "triage", "data": "triage.jsonl"}]}
EVAL = {"training": {"data": "train.jsonl", "eval_data": "eval.jsonl"}}
FEW = "are fewer than [shadow].min_examples = 30: no version can be promoted; give"


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base, to spoil."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "base"))


@pytest.fixture
def site(sockets: Path, model: Path) -> ReadableSite:
    return ReadableSite(sockets, model)


def test_a_good_file_is_printed_as_it_is_understood(site: ReadableSite) -> None:
    site.numbered(1)
    ended = site.umbel("check", "--json")
    assert ended.exit_code == 0
    assert ended.stderr.startswith("will bite: "), "only JSON on stdout, so that programs can read it"
    understood = json.loads(ended.stdout)
    assert understood["site"]["state_dir"] == str(site.folder / "state")
    assert understood["training"]["seq_len"] == 512
    assert not (site.folder / "state").exists(), "checking makes nothing"


def test_it_ends_with_one_line_that_a_person_can_read(sockets: Path, model: Path) -> None:
    site = ReadableSite(sockets, model, {**EVAL, **GUARD})
    site.numbered(1200)
    site.numbered(133, "eval.jsonl")
    site.numbered(30, "triage.jsonl")
    ended = site.umbel("check")
    assert (ended.exit_code, ended.stderr) == (0, "")
    memory, told = ended.stdout.split("\n", 1)
    assert memory.startswith("memory o")
    assert told == (
        f"ok: clinic-a, base base at {model}, adapter support, 1,200 training and 133 held-out examples, "
        "guard triage with 30\n"
    )


def test_examples_that_are_asked_are_not_trained_on_and_are_counted(sockets: Path, model: Path) -> None:
    site = ReadableSite(sockets, model, {**EVAL, **GUARD})
    rows = [{"prompt": f"Ward {number}?", "completion": "b"} for number in range(600)]
    site.write(rows)
    site.write([{**row, "prompt": f"  {str(row['prompt']).upper()}"} for row in rows[:30]], "eval.jsonl")
    site.write([{**row, "system": "You are the desk."} for row in rows[570:]], "triage.jsonl")
    told = "540 training and 30 held-out examples (60 are not trained on: held-out examples or guards ask the same), "
    assert site.umbel("check").stdout.endswith(told + "guard triage with 30\n")
    shown = " ".join(site.umbel("data").stdout.split())
    assert "540 to train on, 30 held out; 60 withheld: held-out examples or guards ask the same" in shown
    (site.folder / "eval.jsonl").write_text("no JSON")
    assert "570 to train on, 0 held out; 30 withheld" in " ".join(site.umbel("data").stdout.split())
    (site.folder / "triage.jsonl").unlink()
    assert "guard triage cannot be read, so what it withholds is not" in " ".join(site.umbel("data").stdout.split())


def test_it_counts_the_share_that_is_held_out_of_the_data(sockets: Path, model: Path) -> None:
    site = ReadableSite(sockets, model, {"training": {"data": "train.jsonl", "eval_fraction": 0.2}})
    site.numbered(600)
    found = re.search(r"([0-9]+) training and ([0-9]+) held-out examples\n$", site.umbel("check").stdout)
    assert found is not None
    train, held_out = map(int, found.groups())
    assert train + held_out == 600
    assert 80 < held_out < 160


def test_what_will_keep_every_version_from_being_promoted_is_said(sockets: Path, model: Path) -> None:
    site = ReadableSite(sockets, model, {**EVAL, **GUARD})
    site.numbered(50)
    site.numbered(12, "eval.jsonl")
    site.numbered(3, "triage.jsonl")
    ended = site.umbel("check")
    assert (ended.exit_code, ended.stderr) == (0, ""), "it can be served all the same"
    assert ended.stdout.splitlines()[1:] == [
        f"will bite: 12 held-out examples {FEW} more eval_data or lower it",
        f"will bite: 3 examples of guard triage {FEW} it more or lower it",
    ]


def test_examples_that_are_too_long_are_told_before_anything_is_started(sockets: Path, model: Path) -> None:
    site = ReadableSite(sockets, model, {"training": {"data": "train.jsonl", "seq_len": 24}})
    long = [{"prompt": f"{number} " * 40, "completion": "b"} for number in range(99)]
    site.write([*long, {"prompt": "a", "completion": "b"}])
    _, first, second = site.umbel("check").stdout.splitlines()
    assert first.startswith("will bite: 99 of 100 examples of [training].data are left out, because their answer beg")
    assert second.startswith("will bite: 0 held-out examples are fewer"), "what is left out is in no set"
    site.write([*({"prompt": str(n), "completion": "b"} for n in range(600)), *long[:3]])
    assert site.umbel("check").stdout.endswith(" held-out examples (3 cut at seq_len, 3 of them left out)\n")
    site.write(long)
    ended = site.umbel("check")
    assert ended.exit_code == 1
    assert "no trainable token in any of 99 examples" in ended.stderr


def test_the_first_refused_lines_of_each_file_are_named_and_the_command_that_shows_all(
    sockets: Path, model: Path
) -> None:
    site = ReadableSite(sockets, model, GUARD)
    site.write([{"prompt": "a", "completion": "b"}, *["no JSON"] * 5])
    guard = site.write(["{}"], "triage.jsonl")
    ended = site.umbel("check")
    assert (ended.exit_code, ended.stdout) == (1, "")
    lines = [line.removeprefix("umbel: ") for line in ended.stderr.splitlines()]
    assert [line.partition(": not JSON")[0] for line in lines[:3]] == [f"{site.data}:{number}" for number in (2, 3, 4)]
    assert lines[3] == f"[training].data: 5 of 6 examples are refused; `umbel data {site.file}` shows them"
    assert lines[4].startswith(f"{guard}:1: no kind of example")
    assert lines[5].endswith(f"1 of 1 examples are refused; `umbel data {site.file} --file {guard}` shows them")
    assert len(lines) == 6


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "train.jsonl: holds no example; expected a JSON object with"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}', "train.jsonl:2: no kind of example; expected"),
        ('{"prompt": "a"', "train.jsonl:1: not JSON (Expecting ',' delimiter"),
        ('{"prompt": "a", "completion": ""}', "the answer is empty; write one or remove the line"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(site: ReadableSite, content: str, says: str) -> None:
    site.write([content])
    ended = site.umbel("check")
    assert ended.exit_code == 1
    assert says in ended.stderr


def test_a_template_that_refuses_the_turns_is_found_offline(site: ReadableSite, model: Path) -> None:
    template = model / "chat_template.jinja"
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    template.write_text(refuses + template.read_text())
    site.write([{"system": "Be brief.", "prompt": "a", "completion": "b"}])
    assert "train.jsonl:1: the chat template refuses the turns: no system turn" in site.umbel("check").stderr


@pytest.mark.parametrize(("file", "content"), [("tokenizer.json", "{}"), ("chat_template.jinja", "{% for %}")])
def test_a_tokenizer_or_template_that_does_not_load_is_blamed_by_its_own_name(
    site: ReadableSite, model: Path, file: str, content: str
) -> None:
    site.numbered(1)
    (model / file).write_text(content)
    ended = site.umbel("check")
    assert ended.exit_code == 1
    assert file in ended.stderr
    assert "train.jsonl" not in ended.stderr


def test_a_port_that_is_taken_is_told(site: ReadableSite) -> None:
    site.numbered(1)
    port = int(re.findall(r"port = ([0-9]+)", site.file.read_text())[0])
    with socket.create_server(("127.0.0.1", port)):
        ended = site.umbel("check")
    assert ended.exit_code == 1
    assert f"[engine].port: 127.0.0.1:{port} cannot be used" in ended.stderr
    assert site.umbel("check").exit_code == 0


@pytest.mark.parametrize("command", ["check", "data"])
@pytest.mark.skipif(bool(importlib.util.find_spec("transformers")), reason="for the environment without transformers")
def test_flowers_environment_says_which_one_tokenises(sockets: Path, command: str) -> None:
    write_base(sockets / "base")
    (sockets / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (sockets / "site.toml").write_text(site_toml())
    assert "belongs to the other environment, the one with umbel[site]: .venv-engine" in refusal(
        command, sockets / "site.toml"
    )


BILLING = {"adapter": [{"name": "support"}, {"name": "billing", "data": "billing.jsonl"}]}


def test_each_adapter_is_checked_on_its_own_examples(sockets: Path, model: Path) -> None:
    site = ReadableSite(sockets, model, {**BILLING, "serve": [{"name": "legal", "path": "legal"}]})
    site.numbered(1200)
    site.numbered(600, "billing.jsonl")
    (sockets / "legal").mkdir()
    (sockets / "legal" / peft_dir.WEIGHTS).write_bytes(random_adapter(model, seed=1))
    settings = peft_dir.encode_settings(rank=RANK, target_modules=LINEARS, base="")
    (sockets / "legal" / peft_dir.CONFIG).write_bytes(settings)
    told = site.umbel("check").stdout
    assert re.search(
        r"adapter support, 1,0\d\d training and 1\d\d held-out examples, "
        r"adapter billing, 5\d\d training and \d\d held-out examples, legal served only\n$",
        told,
    ), told


def test_what_is_refused_names_the_adapter_and_the_command_that_shows_it(sockets: Path, model: Path) -> None:
    site = ReadableSite(sockets, model, BILLING)
    site.numbered(1200)
    site.write(["{}"], "billing.jsonl")
    last = refusal("check", site.file).splitlines()[-1]
    assert "[[adapter]] billing.data: 1 of 1 examples are refused; `umbel data " in last
    assert last.endswith(" --adapter billing` shows them")


def test_a_file_of_an_adapter_that_is_missing_is_named_by_its_setting(sockets: Path, model: Path) -> None:
    site = ReadableSite(sockets, model, BILLING)
    site.numbered(1200)
    missing = f"[[adapter]] billing.data: {sockets}/billing.jsonl does not exist; point it to a JSONL file"
    assert refusal("check", site.file) == missing


def test_fewer_slots_than_adapters_will_bite(sockets: Path, model: Path) -> None:
    site = ReadableSite(sockets, model, {**BILLING, "engine": {"dtype": "float32", "slots": 2}})
    site.numbered(1200)
    site.numbered(600, "billing.jsonl")
    assert "will bite: [engine].slots = 2 are fewer than the base and 2 adapters" in site.umbel("check").stdout
