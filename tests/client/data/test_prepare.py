"""Training data: loss on the answers and only there, a stable split, and errors that name the line and no content."""

import asyncio
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from client.data.chat_tokens import ChatTokenizer
from client.data.examples import MAX_LINE, parse
from client.data.prepare import Prepared, prepare, prepare_in_child
from umbel.errors import ConfigError, DataError
from umbel.token_file import NO_LOSS, TokenFile

SECRET = "Zyxwv"  # in examples; must never be in a message
CHATML = (  # like Qwen's: no generation spans, a line break after the end of a turn
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MARKED_WITHOUT_END = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{{ '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
THINKS_LAST = (  # like Qwen3's: only the last answer gets a thought
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ 'hm. ' }}{% endif %}{{ m['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
REFUSES = "{{ raise_exception('roles must alternate') }}"
QUOTES = "{{ raise_exception('bad: ' + messages[0]['content']) }}"
TWO_TURNS = [("user", "one"), ("assistant", " first "), ("user", "two"), ("assistant", "second\n\nlines é😀")]


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base's tokenizer, to change."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors")))


def with_template(model: Path, template: str | None) -> ChatTokenizer:
    file = model / "chat_template.jinja"
    file.unlink()
    if template is not None:
        file.write_text(template)
    return ChatTokenizer.load(model)


def learned(tokenizer: ChatTokenizer, turns: list[tuple[str, str]]) -> list[str]:
    """The stretches of text that carry a loss."""
    ids, labels = tokenizer.encode(turns, "x:1")
    assert all(label in (NO_LOSS, token) for token, label in zip(ids, labels, strict=True))
    stretches: list[list[int]] = [[]]
    for label in labels:
        if label == NO_LOSS:
            stretches.append([])
        else:
            stretches[-1].append(label)
    return [tokenizer.tokenizer.decode(stretch) for stretch in stretches if stretch]


@pytest.mark.parametrize("template", ["as built", CHATML, MARKED_WITHOUT_END])
def test_loss_is_on_answers_and_their_end_only(model: Path, template: str) -> None:
    tokenizer = ChatTokenizer.load(model) if template == "as built" else with_template(model, template)
    assert learned(tokenizer, TWO_TURNS) == [" first <|end|>", "second\n\nlines é😀<|end|>"]


def test_marked_and_unmarked_templates_agree_with_transformers(model: Path) -> None:
    tokenizer = ChatTokenizer.load(model)
    turns = [("user", "one"), ("assistant", "first"), ("user", "two"), ("assistant", "second")]
    theirs = tokenizer.tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in turns],
        tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
    )  # fmt: skip
    ids, labels = tokenizer.encode(turns, "x:1")
    assert ids == theirs["input_ids"]
    assert [int(label != NO_LOSS) for label in labels] == theirs["assistant_masks"]


def test_template_that_writes_earlier_answers_differently(model: Path) -> None:
    tokenizer = with_template(model, THINKS_LAST)
    assert learned(tokenizer, TWO_TURNS[:2]) == ["hm.  first <|end|>"]
    with pytest.raises(DataError, match=r"f:7: messages\[1\].*one line per answer"):
        tokenizer.encode(TWO_TURNS, "f:7")


def test_base_without_template(model: Path) -> None:
    tokenizer = with_template(model, None)
    assert learned(tokenizer, [("user", "1 + 1 ="), ("assistant", " 2")]) == [" 2<|end|>"]
    with pytest.raises(DataError, match=r"f:7: .*no chat template"):
        tokenizer.encode(TWO_TURNS, "f:7")


def test_template_refusals_never_quote_an_example(model: Path) -> None:
    with pytest.raises(DataError, match=r"f:7: .*roles must alternate"):
        with_template(model, REFUSES).encode(TWO_TURNS, "f:7")
    with pytest.raises(DataError, match="f:7") as caught:
        with_template(model, QUOTES).encode([("user", SECRET), ("assistant", "x")], "f:7")
    assert SECRET not in str(caught.value)


def test_base_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        ChatTokenizer.load(tmp_path)


def test_parses_every_kind() -> None:
    def turns(example: dict[str, Any]) -> list[tuple[str, str]]:
        return parse(json.dumps(example).encode(), "f:1")

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
        (b'{"messages": [{"role": "assistant", "content": "Zyxwv", "tool_calls": []}]}', "and no more"),
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


def write_lines(path: Path, examples: Sequence[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in examples))
    return path


def rows(path: Path) -> set[tuple[int, ...]]:
    tokens = TokenFile.open(path)
    return {tuple(ids[:length]) for ids, length in zip(tokens.ids.tolist(), tokens.lengths.tolist(), strict=True)}


def test_prepares_splits_and_counts(tiny_llama: Path, tmp_path: Path) -> None:
    examples = [(f"question {n}", f"answer {n}") for n in range(60)]
    data = write_lines(tmp_path / "data.jsonl", examples + examples[:20])
    done = prepare(data, None, 0.2, tiny_llama, 32, tmp_path / "tokens")
    train, held_out = TokenFile.open(done.train), TokenFile.open(done.eval)
    assert (len(train), len(held_out)) == (done.train_examples, done.eval_examples)
    assert done.train_examples + done.eval_examples == 80
    assert 2 <= done.eval_examples <= 35
    assert done.train_loss_tokens == train.loss_tokens() > done.train_examples
    assert (done.cut, done.dropped) == (0, 0)
    assert not rows(done.train) & rows(done.eval)  # duplicates are on one side
    longer = write_lines(tmp_path / "longer.jsonl", [("new", "line"), *examples])
    again = prepare(longer, None, 0.2, tiny_llama, 32, tmp_path / "other")
    assert rows(done.train) <= rows(again.train)  # nobody moved
    assert rows(done.eval) <= rows(again.eval)


@pytest.mark.parametrize("fraction", [0.0001, 0.9999])
def test_neither_side_is_empty(tiny_llama: Path, tmp_path: Path, fraction: float) -> None:
    data = write_lines(tmp_path / "data.jsonl", [("a", "b"), ("c", "d")])
    done = prepare(data, None, fraction, tiny_llama, 16, tmp_path / "tokens")
    assert (done.train_examples, done.eval_examples) == (1, 1)
    alone = prepare(write_lines(data, [("a", "b")] * 3), None, fraction, tiny_llama, 16, tmp_path / "tokens")
    assert (alone.train_examples, alone.eval_examples) == (3, 0)


def test_same_inputs_no_work_other_inputs_replace(tiny_llama: Path, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "data.jsonl", [("a", "b"), ("c", "d")])
    held_out = write_lines(tmp_path / "eval.jsonl", [("e", "f")])
    into = tmp_path / "tokens"
    first = prepare(data, held_out, 0.1, tiny_llama, 16, into)
    assert (first.train_examples, first.eval_examples) == (2, 1)
    before = first.train.stat().st_mtime_ns
    assert prepare(data, held_out, 0.1, tiny_llama, 16, into) == first
    assert first.train.stat().st_mtime_ns == before
    second = prepare(data, held_out, 0.1, tiny_llama, 24, into)
    assert [path.name for path in into.iterdir()] == [second.train.parent.name]
    assert into.joinpath(second.train.parent).stat().st_mode & 0o077 == 0


def test_cuts_and_drops(tiny_llama: Path, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "data.jsonl", [("hi", "yes"), ("hi", "long " * 40), ("long " * 40, "no")])
    held_out = write_lines(tmp_path / "eval.jsonl", [("hi", "no")])
    done = prepare(data, held_out, 0.1, tiny_llama, 16, tmp_path / "tokens")
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
        prepare(data, None, 0.1, tiny_llama, 16, tmp_path / "tokens")
    assert SECRET not in str(caught.value)


def test_a_byte_order_mark_is_no_mistake(tiny_llama: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "completion": "b"}\r\n')
    assert prepare(data, None, 0.1, tiny_llama, 16, tmp_path / "tokens").train_examples == 1


def test_child_gives_the_same_result_and_errors(tiny_llama: Path, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "data.jsonl", [("a", "b"), ("c", "d")])

    def in_child(file: Path) -> Prepared:
        return asyncio.run(prepare_in_child(file, None, 0.1, tiny_llama, 16, tmp_path / "tokens"))

    done = in_child(data)
    assert done == prepare(data, None, 0.1, tiny_llama, 16, tmp_path / "tokens")
    with pytest.raises(DataError, match=r"missing\.jsonl: cannot be read"):
        in_child(tmp_path / "missing.jsonl")


@pytest.mark.parametrize("answer", ["", "  \n"])
def test_an_empty_answer_is_nothing_to_learn(tmp_path: Path, tiny_llama: Path, answer: str) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text(
        json.dumps({"prompt": "p", "completion": "c"}) + "\n" + json.dumps({"prompt": "p", "completion": answer})
    )
    with pytest.raises(DataError, match=r"train\.jsonl:2: the answer is empty"):
        prepare(data, None, 0.5, tiny_llama, 32, tmp_path / "out")


def test_guards_are_prepared_whole_and_beside_the_held_out_examples(tiny_llama: Path, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "data.jsonl", [(f"question {n}", f"answer {n}") for n in range(20)])
    guards = {
        "triage": write_lines(tmp_path / "a.jsonl", [("knee", "K"), ("eye", "B"), ("long " * 40, "lost")]),
        "letters": write_lines(tmp_path / "b.jsonl", [("dear", "sir")]),
    }
    into = tmp_path / "tokens"
    without = prepare(data, None, 0.2, tiny_llama, 32, into)
    assert without.guards == {}
    train, held_out = rows(without.train), rows(without.eval)
    done = asyncio.run(prepare_in_child(data, None, 0.2, tiny_llama, 32, into, guards))
    assert done == prepare(data, None, 0.2, tiny_llama, 32, into, guards)
    assert {name: len(TokenFile.open(file)) for name, file in done.guards.items()} == {"triage": 2, "letters": 1}
    assert (rows(done.train), rows(done.eval)) == (train, held_out), "they take nothing from either"
    assert (done.cut, done.dropped) == (1, 1)
    assert all(file.stat().st_mode & 0o077 == 0 for file in done.guards.values())
    write_lines(guards["letters"], [("dear", "sir"), ("dear", "madam")])
    changed = prepare(data, None, 0.2, tiny_llama, 32, into, guards)
    assert len(TokenFile.open(changed.guards["letters"])) == 2
    assert [path.name for path in into.iterdir()] == [changed.train.parent.name]


def test_released_examples_are_trained_on_only_and_leave_with_the_next_preparation(
    tiny_llama: Path, tmp_path: Path
) -> None:
    data = write_lines(tmp_path / "data.jsonl", [(f"question {n}", f"answer {n}") for n in range(20)])
    guards = {"triage": write_lines(tmp_path / "a.jsonl", [("knee", "K")])}
    into = tmp_path / "tokens"
    without = prepare(data, None, 0.2, tiny_llama, 32, into, guards)
    train, held_out = rows(without.train), rows(without.eval)
    asked = next(f"question {n}" for n in range(20) if _holds(tiny_llama, held_out, f"question {n}", f"answer {n}"))
    given = write_lines(
        tmp_path / "examples.jsonl",
        [("new", "kept"), ("knee", "K"), (asked, asked.replace("question", "answer")), ("long " * 40, "lost")],
    )
    with given.open("a") as file:
        file.write('{"messages": [{"role": "user", "content": "no answer"}]}\nnot JSON\n')
    done = asyncio.run(prepare_in_child(data, None, 0.2, tiny_llama, 32, into, guards, given))
    assert done == prepare(data, None, 0.2, tiny_llama, 32, into, guards, given)
    assert (rows(done.eval), len(rows(done.train) - train)) == (held_out, 1)
    assert train < rows(done.train)
    assert done.train_examples == without.train_examples + 1
    assert done.dropped == 3, "what cannot be used keeps no site from starting"
    again = prepare(data, None, 0.2, tiny_llama, 32, into, guards)
    assert rows(again.train) == train
    assert [path.name for path in into.iterdir()] == [again.train.parent.name]


def _holds(model: Path, among: set[tuple[int, ...]], prompt: str, completion: str) -> bool:
    ids, _ = ChatTokenizer.load(model).encode([("user", prompt), ("assistant", completion)], "x:1")
    return tuple(ids) in among


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, r"guard\.jsonl: cannot be read \(No such file or directory\); see the site file"),
        (b"", r"guard\.jsonl: holds no example"),
        (b'{"prompt": "Zyxwv"', r"guard\.jsonl:1: not JSON"),
        (b'{"prompt": "Zyxwv", "completion": ""}', r"guard\.jsonl:1: the answer is empty"),
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
        prepare(data, None, 0.1, tiny_llama, 16, tmp_path / "tokens", {"triage": guard})
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)
