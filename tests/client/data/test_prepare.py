"""Token files: a stable split, guards and released examples, and errors that name the line and no content."""

import asyncio
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from client.data.chat_tokens import ChatTokenizer
from client.data.conversation import Conversation, Turn
from client.data.examples import MAX_LINE
from client.data.prepare import Preparation, forget_others, prepare, prepare_in_child
from client.worth.row_keys import RowKeys
from client.worth.worth_set import worth_set
from tests.toys.sites.training_data import SECRET, rows, write_lines
from umbel.errors import DataError
from umbel.token_file import TokenFile


def test_prepares_splits_and_counts(tiny_llama: Path, tmp_path: Path) -> None:
    examples = [(f"question {n}", f"answer {n}") for n in range(60)]
    data = write_lines(tmp_path / "data.jsonl", examples + examples[:20])
    done = prepare(Preparation(data, None, 0.2, tiny_llama, 32, tmp_path / "tokens"))
    train, held_out = TokenFile.open(done.train), TokenFile.open(done.eval)
    assert (len(train), len(held_out)) == (done.train_examples, done.eval_examples)
    assert 60 <= done.train_examples + done.eval_examples < 80, "what is held out is kept once"
    assert 2 <= done.eval_examples <= 35
    assert done.clusters["eval"] == list(range(done.eval_examples))
    assert done.train_loss_tokens == train.loss_tokens() > done.train_examples
    assert done.held["held_examples"] + done.eval_examples == 60, "what is there twice is held once"
    assert done.train_examples < done.held["held_loss_tokens"] < done.train_loss_tokens
    assert (done.cut, done.dropped) == (0, 0)
    assert not rows(done.train) & rows(done.eval)  # duplicates are on one side
    longer = write_lines(tmp_path / "longer.jsonl", [("new", "line"), *examples])
    again = prepare(Preparation(longer, None, 0.2, tiny_llama, 32, tmp_path / "other"))
    assert rows(done.train) <= rows(again.train)  # nobody moved
    assert rows(done.eval) <= rows(again.eval)


@pytest.mark.parametrize("fraction", [0.1, 0.3])
def test_of_what_is_not_held_out_a_tenth_can_still_be_set_aside(
    tiny_llama: Path, tmp_path: Path, fraction: float
) -> None:
    data = write_lines(tmp_path / "data.jsonl", [(f"question {n}", f"answer {n}") for n in range(400)])
    done = prepare(Preparation(data, None, fraction, tiny_llama, 32, tmp_path / "tokens"))
    keys = RowKeys.read(done.keys)
    assert (len(keys), done.domains) == (done.train_examples, (done.domains[0],))
    assert done.keys.stat().st_mode & 0o077 == 0
    assert 0.05 * len(keys) <= worth_set(keys).aside.sum() <= 0.15 * len(keys)


def test_a_domain_is_what_an_example_says_or_its_file(tiny_llama: Path, tmp_path: Path) -> None:
    said = ["a", "a", 7, None, ["no", "name"]]
    lines = [{"prompt": f"p {n}", "completion": "c", "domain": domain} for n, domain in enumerate(said)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    given = write_lines(tmp_path / "given.jsonl", [("q", "c")])
    held = write_lines(tmp_path / "held.jsonl", [("other", "c")])
    done = prepare(Preparation(tmp_path / "data.jsonl", held, 0.1, tiny_llama, 32, tmp_path / "tokens", released=given))
    assert RowKeys.read(done.keys).domain.tolist() == [0, 0, 1, 2, 2, 3]
    assert len(set(done.domains)) == 4


@pytest.mark.parametrize("fraction", [0.0001, 0.9999])
def test_neither_side_is_empty(tiny_llama: Path, tmp_path: Path, fraction: float) -> None:
    data = write_lines(tmp_path / "data.jsonl", [("a", "b"), ("c", "d")])
    done = prepare(Preparation(data, None, fraction, tiny_llama, 16, tmp_path / "tokens"))
    assert (done.train_examples, done.eval_examples) == (1, 1)
    alone = prepare(
        Preparation(write_lines(data, [("a", "b")] * 3), None, fraction, tiny_llama, 16, tmp_path / "tokens")
    )
    assert (alone.train_examples, alone.eval_examples, alone.held["held_examples"]) == (3, 0, 1)


def test_same_inputs_no_work_other_inputs_replace(tiny_llama: Path, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "data.jsonl", [("a", "b"), ("c", "d")])
    held_out = write_lines(tmp_path / "eval.jsonl", [("e", "f")])
    into = tmp_path / "tokens"
    first = prepare(Preparation(data, held_out, 0.1, tiny_llama, 16, into))
    assert (first.train_examples, first.eval_examples) == (2, 1)
    before = first.train.stat().st_mtime_ns
    assert prepare(Preparation(data, held_out, 0.1, tiny_llama, 16, into)) == first
    assert first.train.stat().st_mtime_ns == before
    second = prepare(Preparation(data, held_out, 0.1, tiny_llama, 24, into))
    assert [path.name for path in into.iterdir()] == [second.train.parent.name]
    assert into.joinpath(second.train.parent).stat().st_mode & 0o077 == 0


def test_cuts_and_drops(tiny_llama: Path, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "data.jsonl", [("hi", "yes"), ("hi", "long " * 40), ("long " * 40, "no")])
    held_out = write_lines(tmp_path / "eval.jsonl", [("well", "no")])
    done = prepare(Preparation(data, held_out, 0.1, tiny_llama, 16, tmp_path / "tokens"))
    assert (done.train_examples, done.cut, done.dropped) == (2, 2, 1)
    assert TokenFile.open(done.train).lengths.max() == 16


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "holds no example"),
        (b"\n  \n", "holds no example"),
        (b'\n{"prompt": 1}\n', r"data\.jsonl:2: no kind"),
        (b"x" * (MAX_LINE + 2), r"data\.jsonl:1: over 4 MiB"),
        (json.dumps({"prompt": "Zyxwv " * 40, "completion": "x"}).encode(), r"no trainable token.*raise \[training\]"),
    ],
)
def test_unusable_files(tiny_llama: Path, tmp_path: Path, content: bytes, says: str) -> None:
    data = tmp_path / "data.jsonl"
    data.write_bytes(content)
    with pytest.raises(DataError, match=says) as caught:
        prepare(Preparation(data, None, 0.1, tiny_llama, 16, tmp_path / "tokens"))
    assert SECRET not in str(caught.value)


def test_a_byte_order_mark_is_no_mistake(tiny_llama: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "completion": "b"}\r\n')
    assert prepare(Preparation(data, None, 0.1, tiny_llama, 16, tmp_path / "tokens")).train_examples == 1


def test_child_gives_the_same_result_and_errors(tiny_llama: Path, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "data.jsonl", [("a", "b"), ("c", "d")])
    guards = {"triage": write_lines(tmp_path / "a.jsonl", [("knee", "K"), ("eye", "B")])}
    given = write_lines(tmp_path / "examples.jsonl", [("new", "kept")])

    def wanted(file: Path) -> Preparation:
        return Preparation(file, None, 0.1, tiny_llama, 16, tmp_path / "tokens", guards, given)

    done = asyncio.run(prepare_in_child(wanted(data)))
    assert done == prepare(wanted(data))
    assert (done.train_examples, list(done.guards)) == (2, ["triage"])
    with pytest.raises(DataError, match=r"missing\.jsonl: cannot be read"):
        asyncio.run(prepare_in_child(wanted(tmp_path / "missing.jsonl")))


@pytest.mark.parametrize("answer", ["", "  \n"])
def test_an_empty_answer_is_nothing_to_learn(tmp_path: Path, tiny_llama: Path, answer: str) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text(
        json.dumps({"prompt": "p", "completion": "c"}) + "\n" + json.dumps({"prompt": "p", "completion": answer})
    )
    with pytest.raises(DataError, match=r"train\.jsonl:2: completion: the answer is empty"):
        prepare(Preparation(data, None, 0.5, tiny_llama, 32, tmp_path / "out"))


def test_guards_are_prepared_whole_and_beside_the_held_out_examples(tiny_llama: Path, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "data.jsonl", [(f"question {n}", f"answer {n}") for n in range(20)])
    guards = {
        "triage": write_lines(tmp_path / "a.jsonl", [("knee", "K"), ("eye", "B"), ("long " * 40, "lost")]),
        "letters": write_lines(tmp_path / "b.jsonl", [("dear", "sir")]),
    }
    into = tmp_path / "tokens"
    without = prepare(Preparation(data, None, 0.2, tiny_llama, 32, into))
    assert without.guards == {}
    train, held_out = rows(without.train), rows(without.eval)
    done = prepare(Preparation(data, None, 0.2, tiny_llama, 32, into, guards))
    assert {name: len(TokenFile.open(file)) for name, file in done.guards.items()} == {"triage": 2, "letters": 1}
    assert (rows(done.train), rows(done.eval)) == (train, held_out), "they take nothing from either"
    assert (done.cut, done.dropped) == (1, 1)
    assert all(file.stat().st_mode & 0o077 == 0 for file in done.guards.values())
    write_lines(guards["letters"], [("dear", "sir"), ("dear", "madam")])
    changed = prepare(Preparation(data, None, 0.2, tiny_llama, 32, into, guards))
    assert len(TokenFile.open(changed.guards["letters"])) == 2
    assert [path.name for path in into.iterdir()] == [changed.train.parent.name]


def test_released_examples_are_trained_on_only_and_leave_with_the_next_preparation(
    tiny_llama: Path, tmp_path: Path
) -> None:
    data = write_lines(tmp_path / "data.jsonl", [(f"question {n}", f"answer {n}") for n in range(20)])
    guards = {"triage": write_lines(tmp_path / "a.jsonl", [("knee", "K")])}
    into = tmp_path / "tokens"
    without = prepare(Preparation(data, None, 0.2, tiny_llama, 32, into, guards))
    train, held_out = rows(without.train), rows(without.eval)
    asked = next(f"question {n}" for n in range(20) if _holds(tiny_llama, held_out, f"question {n}", f"answer {n}"))
    given = write_lines(
        tmp_path / "examples.jsonl",
        [("new", "kept"), ("knee", "K"), (asked, asked.replace("question", "answer")), ("long " * 40, "lost")],
    )
    with given.open("a") as file:
        file.write('{"messages": [{"role": "user", "content": "no answer"}]}\nnot JSON\n')
    done = prepare(Preparation(data, None, 0.2, tiny_llama, 32, into, guards, given))
    assert (rows(done.eval), len(rows(done.train) - train)) == (held_out, 1)
    assert train < rows(done.train)
    assert done.train_examples == without.train_examples + 1
    assert done.dropped == 3, "what cannot be used keeps no site from starting"
    again = prepare(Preparation(data, None, 0.2, tiny_llama, 32, into, guards))
    assert rows(again.train) == train
    assert [path.name for path in into.iterdir()] == [again.train.parent.name]


def _holds(model: Path, among: set[tuple[int, ...]], prompt: str, completion: str) -> bool:
    conversation = Conversation((Turn("user", prompt), Turn("assistant", completion)))
    ((ids, _),) = ChatTokenizer.load(model).encode(conversation, "x:1").rows
    return tuple(ids) in among


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, r"guard\.jsonl: cannot be read \(No such file or directory\); see the site file"),
        (b"", r"guard\.jsonl: holds no example"),
        (b'{"prompt": "Zyxwv"', r"guard\.jsonl:1: not JSON"),
        (b'{"prompt": "Zyxwv", "completion": ""}', r"guard\.jsonl:1: completion: the answer is empty"),
    ],
)
def test_an_unusable_guard_is_named_in_one_line(
    tiny_llama: Path, tmp_path: Path, content: bytes | None, says: str
) -> None:
    data = write_lines(tmp_path / "data.jsonl", [("a", "b"), ("c", "d")])
    guard = tmp_path / "guard.jsonl"
    if content is not None:
        guard.write_bytes(content)
    with pytest.raises(DataError, match=says) as caught:
        prepare(Preparation(data, None, 0.1, tiny_llama, 16, tmp_path / "tokens", {"triage": guard}))
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_token_files_of_adapters_that_are_gone_and_of_before_several_adapters_are_removed(tmp_path: Path) -> None:
    for name in ("support", "gone", "a" * 64, f".{'b' * 64}.tmp"):
        (tmp_path / "data" / name).mkdir(parents=True)
    forget_others(tmp_path / "data", ("support", "billing"))
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["support"]
    forget_others(tmp_path / "none", ("support",))


def test_what_is_in_use_stays_and_the_next_preparation_removes_what_a_crash_left(
    tiny_llama: Path, tmp_path: Path
) -> None:
    data, into = write_lines(tmp_path / "data.jsonl", [("a", "b"), ("c", "d")]), tmp_path / "tokens"
    wanted = Preparation(data, None, 0.1, tiny_llama, 16, into)
    first = prepare(wanted)
    write_lines(data, [("a", "b"), ("c", "d"), ("e", "f")])
    second = prepare(replace(wanted, keep=(first.folder.name,)))
    assert {path.name for path in into.iterdir()} == {first.folder.name, second.folder.name}
    assert prepare(wanted) == second
    assert [path.name for path in into.iterdir()] == [second.folder.name]


def test_tokens_of_a_file_that_changed_meanwhile_are_not_found_again_for_its_content_of_before(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, into = write_lines(tmp_path / "data.jsonl", [("a", "b"), ("c", "d")]), tmp_path / "tokens"
    wanted, before = Preparation(data, None, 0.1, tiny_llama, 16, into), data.read_text()
    load = ChatTokenizer.load

    def changed(model: Path) -> ChatTokenizer:
        write_lines(data, [("a", "b"), ("c", "d"), ("e", "f")])
        return load(model)

    with monkeypatch.context() as patched:
        patched.setattr(ChatTokenizer, "load", changed)
        torn = prepare(wanted)
    assert torn.train_examples + torn.eval_examples == 3
    data.write_text(before)
    again = prepare(wanted)
    assert again.train_examples + again.eval_examples == 2
    assert [path.name for path in into.iterdir()] == [again.folder.name]


def test_a_preparation_that_fails_leaves_no_tokens_behind(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, into = write_lines(tmp_path / "data.jsonl", [("a", "b"), ("c", "d")]), tmp_path / "tokens"

    def full(path: Path, *_: object, **__: object) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("umbel.token_file.write", full)
    with pytest.raises(OSError, match="No space"):
        prepare(Preparation(data, None, 0.1, tiny_llama, 16, into))
    assert list(into.iterdir()) == []


def test_the_child_makes_way_for_the_engine_where_processors_or_memory_run_short(tmp_path: Path) -> None:
    code = (
        "import os; from client.data.prepare import main; main(); score = int(open('/proc/self/oom_score_adj').read())"
    )
    wanted = Preparation(tmp_path / "none.jsonl", None, 0.1, tmp_path, 16, tmp_path / "tokens")
    child = subprocess.run(
        [sys.executable, "-c", f"{code}; print(); print(os.nice(0), score)"],
        input=TypeAdapter(Preparation).dump_json(wanted), capture_output=True, check=True,
    )  # fmt: skip
    answer, made_way = child.stdout.decode().splitlines()
    assert json.loads(answer)["error"] == "DataError"
    nice, score = map(int, made_way.split())
    assert nice >= min(19, os.nice(0) + 10)
    assert score == 1000
