"""`umbel data`: each example as it is trained on, for people and for programs; what is refused ends it with 1."""

import gzip
import json
from pathlib import Path

import pytest

from tests.toys.command_line import umbel
from tests.toys.sites.readable_site import ReadableSite

WARD = {"messages": [{"role": "user", "content": "knee?"}, {"role": "assistant", "content": "Ward 7."}]}
TYPO = {"instruction": "Translate", "inputs": "seven", "output": "sept"}


@pytest.fixture
def site(tmp_path: Path, tiny_llama: Path) -> ReadableSite:
    return ReadableSite(tmp_path, tiny_llama, {"training": {"data": "train.jsonl", "seq_len": 64}})


def test_for_programs_each_example_is_one_object(site: ReadableSite) -> None:
    greets = {"messages": [{"role": "assistant", "content": "Hello."}, *WARD["messages"]]}
    site.write([WARD, "", TYPO, greets, {"prompt": "a", "completion": "long " * 200}])
    first, refused, greeting, long = site.lines("data", "--json")
    assert first == {
        "line": 1, "prompt": "<|user|>knee?<|end|><|assistant|>", "trained": ["Ward 7.<|end|>"], "pair": False,
        "tokens": first["tokens"], "cut": False, "dropped": False, "untold": 0, "refused": None,
    }  # fmt: skip
    assert 8 < first["tokens"] < 24
    assert (refused["line"], refused["prompt"], refused["trained"], refused["tokens"]) == (3, None, [], 0)
    assert refused["refused"].startswith('"inputs" is no known field; did you mean "input"?')
    assert (greeting["untold"], greeting["trained"]) == (1, ["Ward 7.<|end|>"])
    assert (long["cut"], long["dropped"], long["tokens"] > 64) == (True, False, True)
    assert ("long " * 200).startswith(long["trained"][0])
    assert site.umbel("data", "--json").exit_code == 1


def test_the_exit_status_says_whether_a_line_is_refused(site: ReadableSite) -> None:
    site.write([WARD, TYPO])
    assert site.umbel("data").exit_code == 1
    assert site.umbel("data", "--line", "1").exit_code == 0
    assert site.umbel("data", "--line", "2").exit_code == 1
    assert site.umbel("data", "--line", "2", "--json").exit_code == 1
    site.write([WARD])
    assert (site.umbel("data").exit_code, site.umbel("data", "--json").exit_code) == (0, 0)


def test_for_people_what_carries_a_loss_is_marked(site: ReadableSite) -> None:
    site.write([WARD] * 5)
    shown = site.umbel("data").stdout
    assert shown.count("<|user|>knee?<|end|><|assistant|>⟦Ward 7.<|end|>⟧") == 3, "the first examples"
    assert "examples   5\n" in "".join(line.rstrip() + "\n" for line in shown.splitlines())
    assert "4 of 5 examples of [training].data repeat one further up" in " ".join(shown.split())
    assert "5 to train on, 0 held out" in shown
    assert "\x1b" not in shown


def test_refused_lines_are_grouped_by_their_reason(site: ReadableSite) -> None:
    site.write([WARD, TYPO, TYPO, TYPO, WARD, TYPO, "no JSON"])
    shown = " ".join(site.umbel("data").stdout.split())
    assert "examples 7, 5 refused" in shown
    assert "refused lines 2-4, 6: " in shown
    assert "refused line 7: not JSON" in shown


def test_one_line_is_shown_in_full_token_by_token(site: ReadableSite) -> None:
    site.write([WARD, {"prompt": "w" * 1000, "completion": "b"}, {"prompt": "a", "completion": "end " * 100}])
    shown = site.umbel("data", "--line", "1").stdout
    tokens = [line.split(maxsplit=3) for line in shown.splitlines() if line.strip()[:1].isdigit()]
    ((_, row),) = [(number, line) for number, line in enumerate(site.lines("data", "--line", "1", "--json"))]
    assert len(tokens) == row["tokens"]
    assert [place for place, *_ in tokens] == [str(number) for number in range(row["tokens"])]
    learnt = "".join(json.loads(rest[-1]) for _, _, kind, *rest in tokens if kind == "loss")
    assert learnt == "Ward 7.<|end|>"
    assert site.umbel("data", "--line", "2").stdout.partition("place")[0].count("w") >= 1000
    assert " characters … " in site.umbel("data").stdout, "the middle of what is long is left out"
    assert " characters … " not in site.umbel("data", "--line", "2").stdout
    assert "⟪" in site.umbel("data", "--line", "3").stdout
    missing = site.umbel("data", "--line", "9")
    assert (missing.exit_code, missing.stdout) == (1, "")
    assert "train.jsonl:9: no example is there" in missing.stderr


def test_no_text_of_an_example_drives_a_terminal_or_looks_like_a_mark(tmp_path: Path, tiny_llama: Path) -> None:
    site = ReadableSite(tmp_path, tiny_llama)
    evil = "a\x1b[31m\x07\x9b\x7f\u202e\u2028⟦b⟧[bold]c\nd"
    site.write([{"prompt": evil, "completion": evil}])
    for arguments in ([], ["--line", "1"]):
        shown = site.umbel("data", *arguments).stdout
        assert not set("\x1b\x07\x9b\x7f\u202e\u2028\r") & set(shown)
        assert r"⟦a\u001b[31m\u0007\u009b\u007f\u202e\u2028\u27e6b\u27e7[bold]c↵" in shown
    (row,) = site.lines("data", "--json")
    assert row["trained"] == [f"{evil}<|end|>"], "programs get the text itself"


def test_another_file_is_shown_by_its_place_in_the_site_file(tmp_path: Path, tiny_llama: Path) -> None:
    site = ReadableSite(tmp_path, tiny_llama, {"shadow.guard": [{"name": "triage", "data": "triage.jsonl"}]})
    guard = site.write([WARD], "triage.jsonl")
    shown = " ".join(site.umbel("data", "--file", guard).stdout.split())
    assert "1 examples of guard triage are fewer than [shadow].min_examples = 30" in shown
    assert "held out" not in shown
    packed = tmp_path / "array.json.gz"
    packed.write_bytes(gzip.compress(json.dumps([WARD, TYPO]).encode()))
    assert [row["line"] for row in site.lines("data", "--file", packed, "--json")] == [1, 2]
    assert "No such file" in site.umbel("data", "--file", tmp_path / "none.jsonl").stderr


def test_a_program_that_reads_it_gets_nothing_else_on_either_stream(site: ReadableSite) -> None:
    site.write([WARD])
    ended = umbel("data", site.file, "--json")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert [json.loads(line)["line"] for line in ended.stdout.splitlines()] == [1]


def test_of_several_adapters_it_must_be_said_whose_data_to_show(tmp_path: Path, tiny_llama: Path) -> None:
    adapters = [{"name": "support"}, {"name": "billing", "data": "billing.jsonl"}]
    site = ReadableSite(tmp_path, tiny_llama, {"adapter": adapters})
    site.write([WARD])
    site.numbered(3, "billing.jsonl")
    assert "this site trains support, billing; say which one" in site.umbel("data").stderr
    assert len(site.lines("data", "--adapter", "billing", "--json")) == 3
    assert len(site.lines("data", "--adapter", "support", "--json")) == 1
    unknown = site.umbel("data", "--adapter", "triage").stderr
    assert "'triage' is not trained here: this site trains support, billing; name one of them" in unknown
