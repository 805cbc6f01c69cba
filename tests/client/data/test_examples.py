"""Examples of every shape are read; errors name the line and no content."""

import json
from pathlib import Path
from typing import Any

import pytest

from client.data.conversation import Conversation, Turn, group_of
from client.data.examples import held_out, parse, read
from client.data.prepare import Preparation, prepare
from client.data.summary import DATA
from tests.toys.sites.training_data import SECRET, write_lines
from umbel.errors import DataError


def test_parses_every_kind() -> None:
    def turns(example: dict[str, Any]) -> list[tuple[str, str]]:
        return [(turn.role, turn.content) for turn in parse(json.dumps(example).encode(), "f:1").turns]

    assert turns({"prompt": "p", "completion": "c", "id": 3}) == [("user", "p"), ("assistant", "c")]
    assert turns({"instruction": "i", "output": "o"}) == [("user", "i"), ("assistant", "o")]
    assert turns({"instruction": "i", "input": "", "output": "o"}) == [("user", "i"), ("assistant", "o")]
    assert turns({"instruction": "i", "input": "n", "output": "o"}) == [("user", "i\n\nn"), ("assistant", "o")]
    messages = [{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}]
    assert turns({"messages": messages}) == [("system", "s"), ("assistant", "a")]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"prompt": "Zyxwv", ', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'["Zyxwv"]', "not a JSON object"),
        (b'{"prompt": "Zyxwv"}', "no kind of example"),
        (b'{"prompt": "Zyxwv", "completion": "", "messages": []}', "more than one kind"),
        (b'{"prompt": "Zyxwv", "completion": 3}', '"completion" is a number; expected a string'),
        (b'{"prompt": "Zyxwv", "completion": null}', '"completion" is empty; expected a string'),
        (b'{"instruction": "Zyxwv", "input": [1], "output": "x"}', '"input" is a list'),
        (b'{"messages": "Zyxwv"}', '"messages" is a string; expected a list'),
        (b'{"messages": []}', '"messages" is empty'),
        (b'{"messages": ["Zyxwv"]}', r"messages\[0\]: expected an object"),
        (b'{"messages": [{"role": "assistant", "content": "x", "notes_to_model": "Zyxwv"}]}', "is no known field"),
        (b'{"messages": [{"role": "assistant", "content": {"Zyxwv": 1}}]}', r'messages\[0\]: "content" is an object'),
        (b'{"messages": [{"role": "user", "content": "Zyxwv"}]}', "no answer to learn"),
        (b'{"prompt": "Zyxwv\xff", "completion": "x"}', "not UTF-8"),
        (b'{"prompt": "Zyxwv\\ud800", "completion": "x"}', "not UTF-8"),
    ],
)
def test_bad_lines_are_named_and_not_quoted(line: bytes, says: str) -> None:
    with pytest.raises(DataError, match=rf"^data\.jsonl:12: .*{says}") as caught:
        parse(line, "data.jsonl:12")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("fraction", [0.0001, 0.2, 0.9999])
def test_counts_are_those_of_the_token_files(tiny_llama: Path, tmp_path: Path, fraction: float) -> None:
    examples = [(f"question {n}", f"answer {n}") for n in range(60)]
    data = write_lines(tmp_path / "data.jsonl", examples + examples[:20])
    done = prepare(Preparation(data, None, fraction, tiny_llama, 32, tmp_path / "tokens"))
    every = [group_of(conversation) for _, conversation in read(data)]
    kept_back = held_out(every, fraction)
    trained = sum(group not in kept_back for group in every)
    assert (trained, len(kept_back)) == (done.train_examples, done.eval_examples), "what is held out counts once"
    eval_data = write_lines(tmp_path / "eval.jsonl", examples[:7])
    done = prepare(Preparation(data, eval_data, fraction, tiny_llama, 32, tmp_path / "tokens"))
    assert (done.train_examples, done.eval_examples, done.withheld) == (66, 7, {DATA: 14})


def test_examples_keep_their_side_whatever_is_added(tmp_path: Path) -> None:
    every = [group_of(Conversation((Turn("user", f"question {n}"), Turn("assistant", "answer")))) for n in range(200)]
    chosen = held_out(every[:100], 0.3)
    assert 10 < len(chosen) < 50
    assert chosen <= held_out(every, 0.3)
    assert not (set(every[:100]) - chosen) & held_out(every, 0.3)
    assert held_out(every[:1], 0.5) == set(), "a single example is for training"


def test_a_file_without_examples_cannot_be_prepared(tiny_llama: Path, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "data.jsonl", [("a", "b")])
    empty = write_lines(tmp_path / "empty.jsonl", [])
    assert len(list(read(data))) == 1
    for files in ((empty, None), (data, empty)):
        with pytest.raises(DataError, match=r"empty\.jsonl: holds no example"):
            prepare(Preparation(*files, 0.1, tiny_llama, 32, tmp_path / "tokens"))
