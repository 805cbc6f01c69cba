"""What a template leaves out is told by its place, not by a text that may stand elsewhere by chance."""

import json
from pathlib import Path
from typing import Any

import pytest

from client.data.chat_tokens import ChatTokenizer
from client.data.examples import parse
from tests.toys.bases.chat_templates import with_template
from tests.toys.bases.learned import spans
from umbel.errors import DataError

HEAD = "{% for m in messages %}{{ '<|' + m.role + '|>' }}"
FOOT = "{{ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
PLAIN = HEAD + "{{ m.content }}" + FOOT
EITHER = (
    HEAD + "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% else %}{{ m.content }}{% endif %}" + FOOT
)
FIRST = HEAD + "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% endif %}" + FOOT
EVERY = HEAD + "{{ m.content }}{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}" + FOOT
ASKED = {"role": "user", "content": "search for the stock"}
TOOLS = [{"type": "function", "function": {"name": "stock"}}]


def answer(content: str | None, *parts: str, **more: Any) -> dict[str, Any]:
    calls = [{"function": {"name": "stock", "arguments": {"part": part}}} for part in parts]
    return {"role": "assistant", "content": content, "tool_calls": calls, **more}


def learnt(model: Path, example: dict[str, Any]) -> list[str]:
    tokenizer = ChatTokenizer.load(model)
    encoded = tokenizer.encode(parse(json.dumps(example).encode(), "f:1"), "f:1")
    return [
        tokenizer.tokenizer.decode(ids[first:end]) for ids, labels in encoded.rows for first, end in spans(list(labels))
    ]


@pytest.mark.parametrize(
    ("template", "example", "says"),
    [
        (PLAIN, {"tools": TOOLS, "messages": [ASKED, answer("Which?")]}, "no place for tools"),
        (PLAIN, {"messages": [ASKED, answer("I ask for the stock.", "K-40")]}, "call of a tool"),
        (EITHER, {"messages": [ASKED, answer("Let me look.", "K-40")]}, "text, or the call of a tool"),
        (FIRST, {"messages": [ASKED, answer("", "K-40", "K-41")]}, "call of a tool"),
        (PLAIN, {"messages": [ASKED, answer("It is 7.", reasoning_content="It is 7")]}, "leaves out text"),
    ],
)
def test_what_the_template_leaves_out_is_refused(
    tiny_llama: Path, tmp_path: Path, template: str, example: dict[str, Any], says: str
) -> None:
    with pytest.raises(DataError, match=says):
        learnt(with_template(tiny_llama, template, tmp_path / "model"), example)


def test_all_calls_and_the_text_beside_them_are_learnt(tiny_llama: Path, tmp_path: Path) -> None:
    model = with_template(tiny_llama, EVERY, tmp_path / "model")
    (said,) = learnt(model, {"messages": [ASKED, answer("Let me look.", "K-40", "K-41")]})
    assert said.startswith("Let me look.{")
    assert said.endswith('"K-41"}}<|end|>')
    assert said.count('"K-40"') == 1


@pytest.mark.parametrize(
    "example",
    [
        {"prompt": "a", "completion": "b", "label": False},
        {"prompt": "a", "completion": "b", "reward": -1.0},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "trainable": False}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "loss_weight": 0}]},
    ],
)
def test_numbers_and_switches_that_nobody_knows_are_refused(example: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="is no known field"):
        parse(json.dumps(example).encode(), "f:1")


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt": "first", "prompt": "second", "completion": "b"}',
        '{"messages": [{"role": "user", "content": "a", "content": "b"}, {"role": "assistant", "content": "c"}]}',
        json.dumps({"messages": [ASKED, answer("b")], "tools": '[{"name": "stock", "name": "stack"}]'}),
    ],
)
def test_a_field_that_is_written_twice_is_refused(line: str) -> None:
    with pytest.raises(DataError, match="is written twice"):
        parse(line.encode(), "f:1")
