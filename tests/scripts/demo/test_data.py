"""The demo's tasks: held-out prompts need the rule, two words decide an answer, and files are the same again."""

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.tools.demo import data
from scripts.tools.demo.data import TASKS, examples, write
from scripts.tools.demo.run import prompt_of


def words_and_answer(task: str, example: dict[str, Any]) -> tuple[str, str, str]:
    """The two words of a prompt that decide, and the answer."""
    prompt = prompt_of(example)
    answer = example.get("completion") or example["messages"][1]["content"]
    (first,) = [word for word in TASKS[task].first if word in prompt]
    (second,) = [word for word in TASKS[task].second if word in prompt]
    return first, second, answer


@pytest.mark.parametrize("task", TASKS)
def test_held_out_prompts_join_words_that_never_meet_in_training(task: str) -> None:
    seen, kept = ({words_and_answer(task, one)[:2] for one in examples(task, heldout=held)} for held in (False, True))
    assert seen
    assert kept
    assert not seen & kept
    assert {pair[0] for pair in kept} <= {pair[0] for pair in seen}, "each word is learned, with others"
    assert {pair[1] for pair in kept} <= {pair[1] for pair in seen}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("heldout", [False, True])
def test_two_words_decide_the_answer(task: str, heldout: bool) -> None:
    for example in examples(task, heldout=heldout):
        first, second, answer = words_and_answer(task, example)
        assert answer == f"{TASKS[task].first[first]} {TASKS[task].second[second]}"


def test_the_tasks_have_no_word_in_common() -> None:
    clinic, shop = ({*TASKS[task].first, *TASKS[task].second} for task in ("clinic", "shop"))
    assert not clinic & shop


def test_the_files_are_the_same_every_time(tmp_path: Path) -> None:
    once, again = write("shop", tmp_path / "a", 40, 10), write("shop", tmp_path / "b", 40, 10)
    assert [path.name for path in once] == ["train.jsonl", "eval.jsonl"]
    assert [path.read_bytes() for path in once] == [path.read_bytes() for path in again]
    lines = [json.loads(line) for path in once for line in path.read_text().splitlines()]
    assert len(lines) == len({prompt_of(line) for line in lines}) == 50


def test_more_examples_than_there_are_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"clinic: 100000 examples asked for train.jsonl, it has \d+ distinct ones"):
        write("clinic", tmp_path, n_train=100_000)


def test_the_command_writes_and_prints_the_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["data", "clinic", str(tmp_path)])
    data.main()
    assert capsys.readouterr().out.split() == [str(tmp_path / "train.jsonl"), str(tmp_path / "eval.jsonl")]
