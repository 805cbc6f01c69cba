"""Kinds of files that users of other software met silence or a wrong message with: the right value, or the remedy."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from client.data.conversation import Turn
from client.data.examples import parse, read
from tests.toys.bases.chat_templates import TEMPLATES, chat_model, with_template
from tests.toys.bases.learned import Base, Checked, spans
from tests.toys.sites.training_data import SECRET
from umbel.errors import DataError

Load = Callable[[str | None], Base]
OIL, GRADE = {"role": "user", "content": "Oil for the K-40?"}, {"role": "assistant", "content": "SAE 30."}
MUCH, LITRES = {"role": "user", "content": "How much?"}, {"role": "assistant", "content": "Two litres."}
STOCK = {"name": "stock", "description": "Count parts.", "parameters": {"type": "object", "properties": {}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "stock", "arguments": '{"part": "K-40"}'}}
CALLED = [
    {"role": "user", "content": "Stock of K-40?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "7"},
    {"role": "assistant", "content": "Seven."},
]


@pytest.fixture(scope="module")
def load(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Load the tiny base with a template of ours; None: without one."""
    made: dict[str | None, Base] = {}

    def one(name: str | None) -> Base:
        if name not in made:
            into = tmp_path_factory.mktemp("base") / "model"
            model = (
                with_template(tiny_llama, None, into) if name is None else chat_model(tiny_llama, TEMPLATES[name], into)
            )
            made[name] = Base.load(model)
        return made[name]

    return one


def turns(example: dict[str, Any]) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in parse(json.dumps(example).encode(), "train.jsonl:3").turns]


def learnt(base: Base, example: dict[str, Any]) -> list[str]:
    """The stretches with a loss, in order, each held against what the engine is sent before it."""
    said = Checked.of(parse(json.dumps(example).encode(), "train.jsonl:3"), base).said
    return [said[index] for index in sorted(said)]


def refused(example: dict[str, Any], base: Base | None = None) -> str:
    """The reason for which an example is refused, by reading it or by the base's template."""

    def use() -> None:
        conversation = parse(json.dumps(example).encode(), "train.jsonl:3")
        if base is not None:
            base.training.encode(conversation, "train.jsonl:3")

    with pytest.raises(DataError, match=r"^train\.jsonl:3: ") as caught:
        use()
    assert SECRET not in str(caught.value)
    return str(caught.value)


def test_a_prompt_that_ends_in_a_space_keeps_its_tokens_and_the_answer_all_of_its_own(load: Load) -> None:
    base = load(None)
    for number in range(40):
        example = {"prompt": f"Sort {number}: ", "completion": str(number % 10)}
        encoded = base.training.encode(parse(json.dumps(example).encode(), "f:7"), "f:7")
        ((ids, labels),) = encoded.rows
        ((first, end),) = spans(labels)
        assert list(ids[:first]) == base.engine(example["prompt"])["input_ids"]
        assert (base.learnt(encoded), end) == ([f"{number % 10}<|end|>"], len(ids))


@pytest.mark.parametrize("name", ["chatml", "qwen3-like", "mistral-like", "r1-like", "gemma-like"])
def test_two_turns_are_both_learnt_under_templates_that_rewrite_the_first(load: Load, name: str) -> None:
    ((head, _),) = TEMPLATES[name].forms
    wanted = [head + text + TEMPLATES[name].end for text in ("SAE 30.", "Two litres.")]
    assert learnt(load(name), {"messages": [OIL, GRADE, MUCH, LITRES]}) == wanted


@pytest.mark.parametrize("name", ["chatml", "mistral-like", "llama-2-like", "gemma-like"])
def test_a_system_turn_is_in_the_prompt_wherever_the_template_puts_it(load: Load, name: str) -> None:
    base, system = load(name), {"role": "system", "content": "You are the pump desk."}
    ((head, _),) = TEMPLATES[name].forms
    assert learnt(base, {"messages": [system, OIL, GRADE]}) == [f"{head}SAE 30.{TEMPLATES[name].end}"]
    by_field = parse(json.dumps({"system": system["content"], "messages": [OIL, GRADE]}).encode(), "f:7")
    ids, _ = base.training.encode(by_field, "f:7").rows[0]
    assert "You are the pump desk." in base.decode(ids)


def test_a_system_turn_that_the_template_drops_is_refused(load: Load) -> None:
    example = {"messages": [{"role": "system", "content": f"You are {SECRET}."}, OIL, GRADE]}
    said = refused(example, load("drops system turns"))
    assert "messages[0]" in said
    assert "system turn" in said
    assert "write it into the user's turn" in said


@pytest.mark.parametrize(
    ("role", "remedy"),
    [
        ("human", 'write "user"'),
        ("User", 'write "user"'),
        ("gpt", 'write "assistant"'),
        ("developer", 'write "system"'),
        ("narrator", "known: system, user, assistant, tool"),
    ],
)
def test_an_unknown_role_is_refused_by_name_with_the_known_ones(role: str, remedy: str) -> None:
    said = refused({"messages": [{"role": role, "content": SECRET}, GRADE]})
    assert f'messages[0]: the role "{role}"' in said
    assert remedy in said


def test_the_system_field_is_the_system_turn() -> None:
    french = "You are the pump desk. Answer in French."
    wanted = [("system", french), ("user", "Stock of K-40?"), ("assistant", "Sept.")]
    assert turns({"system": french, "prompt": "Stock of K-40?", "completion": "Sept."}) == wanted
    assert turns({"system": french, "instruction": "Stock of", "input": "K-40?", "output": "Sept."})[0] == wanted[0]
    assert turns({"system": french, "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]})[
        0
    ] == ("system", french)
    twice = {"system": SECRET, "messages": [{"role": "system", "content": SECRET}, OIL, GRADE]}
    assert "keep one of them" in refused(twice)


def test_alpacas_history_comes_before_the_question() -> None:
    history = [["Oil?", "SAE 30."], ["How much?", "Two litres."]]
    wanted = [("user", "Oil?"), ("assistant", "SAE 30."), ("user", "How much?"), ("assistant", "Two litres.")]
    asked = {"instruction": "When?", "output": "Yearly.", "history": history}
    assert turns(asked) == [*wanted, ("user", "When?"), ("assistant", "Yearly.")]
    assert turns({"prompt": "When?", "completion": "Yearly.", "history": []}) == [
        ("user", "When?"), ("assistant", "Yearly."),
    ]  # fmt: skip
    assert "history[0] is no pair" in refused(asked | {"history": [[SECRET]]})


def test_sharegpts_conversations_are_read() -> None:
    said = [{"from": "human", "value": "Which tyre size?"}, {"from": "gpt", "value": "205/55 R16."}]
    wanted = [("user", "Which tyre size?"), ("assistant", "205/55 R16.")]
    assert turns({"id": "k-1", "conversations": said}) == wanted
    ruled = [{"from": "system", "value": "Be brief."}, *said]
    assert turns({"conversations": ruled}) == [("system", "Be brief."), *wanted]
    unknown = refused({"conversations": [{"from": "observation", "value": SECRET}, *said]})
    assert 'conversations[0]: "observation" is no known speaker; known: human' in unknown
    assert 'did you mean "value"' in refused({"conversations": [said[0], {"from": "gpt", "values": SECRET}]})


@pytest.mark.parametrize(
    ("example", "written", "meant"),
    [
        ({"instruction": "Translate", "inputs": SECRET, "output": "sept"}, "inputs", "input"),
        ({"instruction": "Translate", "Input": SECRET, "output": "sept"}, "Input", "input"),
        ({"instruction": "Translate", "ouput": SECRET}, "ouput", "output"),
        ({"promt": SECRET, "completion": "sept"}, "promt", "prompt"),
        ({"prompt": "p", "completions": SECRET}, "completions", "completion"),
        ({"prompt": "p", "completion": "c", "System": SECRET}, "System", "system"),
        ({"prompt": "p", "completion": "c", "histroy": [[SECRET, "a"]]}, "histroy", "history"),
        ({"message": [OIL, GRADE]}, "message", "messages"),
        ({"conversation": [{"from": "human", "value": SECRET}]}, "conversation", "conversations"),
        ({"messages": [OIL, GRADE], "tool": [SECRET]}, "tool", "tools"),
        ({"messages": [OIL, {"role": "assistant", "contents": SECRET}]}, "contents", "content"),
    ],
)
def test_a_misspelt_field_is_refused_with_what_was_meant(example: dict[str, Any], written: str, meant: str) -> None:
    said = refused(example)
    assert f'"{written}"' in said
    assert f'did you mean "{meant}"' in said


@pytest.mark.parametrize("field", ["context", "rejected", "images", "response", "question", "reasoning"])
def test_a_field_that_might_matter_is_refused_by_name(field: str) -> None:
    said = refused({"prompt": "p", "completion": "c", field: SECRET})
    assert f'"{field}"' in said
    assert "remove" in said or "did you mean" in said


def test_neutral_fields_and_empty_ones_pass() -> None:
    neutral = {"id": 3, "source": "shop", "category": "oil", "lang": "en", "meta": {"a": 1}, "score": 0.5}
    nothing = dict.fromkeys(("tools", "system", "history", "context")) | {"images": [], "label": ""}
    wanted = [("user", "p"), ("assistant", "c")]
    assert turns({"prompt": "p", "completion": "c", **neutral, **nothing}) == wanted
    plain = {"messages": [OIL | {"name": None, "tool_calls": None}, GRADE | {"tool_calls": [], "refusal": None}]}
    assert turns(plain | neutral) == [("user", "Oil for the K-40?"), ("assistant", "SAE 30.")]


def test_an_empty_answer_among_others_is_refused() -> None:
    silent = {"role": "assistant", "content": ""}
    said = refused({"messages": [OIL, silent, {"role": "user", "content": SECRET}, GRADE]})
    assert "messages[1]: the answer is empty; write one" in said
    assert "empty" in refused({"prompt": "p", "completion": " \n", "history": []})
    assert "empty" in refused({"instruction": "a", "output": "b", "history": [[SECRET, " "]]})
    assert "empty" in refused({"conversations": [{"from": "human", "value": SECRET}, {"from": "gpt", "value": ""}]})


def test_a_conversation_that_ends_with_a_question_is_refused() -> None:
    said = refused({"messages": [OIL, GRADE, {"role": "user", "content": SECRET}]})
    assert "messages[2]: the last turn has no answer; add the answer or remove the turn" in said


def test_a_conversation_that_the_assistant_begins_is_trained_where_the_template_takes_it(load: Load) -> None:
    begun = {"messages": [{"role": "assistant", "content": "Hello, pump desk."}, OIL, GRADE]}
    assert learnt(load("chatml"), begun) == ["SAE 30.<|im_end|>"]
    assert "take turns" in refused(begun, load("gemma-like"))


def test_calls_of_tools_are_learnt_where_the_template_writes_them(load: Load) -> None:
    called = '<call>{"name": "stock", "arguments": {"part": "K-40"}}</call><|end|>'
    assert learnt(load("tools"), {"messages": CALLED}) == [called, "Seven.<|end|>"]
    said = refused({"messages": CALLED}, load("chatml"))
    assert "assistant turn" in said
    assert "use a base whose template has a place for it" in said


def test_tools_are_told_where_the_template_takes_them_and_refused_elsewhere(load: Load) -> None:
    base = load("tools")
    for tools in ([{"type": "function", "function": STOCK}], [STOCK], json.dumps([STOCK])):
        example = {"messages": CALLED, "tools": tools}
        assert learnt(base, example)[-1] == "Seven.<|end|>"
        ids, _ = base.training.encode(parse(json.dumps(example).encode(), "f:7"), "f:7").rows[-1]
        assert "Count parts." in base.decode(ids)
    said = refused({"messages": [OIL, GRADE], "tools": [STOCK]}, load("chatml"))
    assert '"tools": the chat template has no place for tools' in said
    assert "remove them" in said


@pytest.mark.parametrize("function", [STOCK, {"name": "stock"}, STOCK | {"strict": True}])
def test_tools_and_calls_are_those_that_the_engine_hands_to_the_template(function: dict[str, Any]) -> None:
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest

    tools = [{"type": "function", "function": function}]
    request = ChatCompletionRequest(model="tiny", messages=CALLED, tools=tools)
    theirs = [message.model_dump() for message in request.messages]
    for message in theirs:  # serving_chat does the same
        message["content"] = message["content"] or ""
        for call in message.get("tool_calls") or ():
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    conversation = parse(json.dumps({"messages": CALLED, "tools": tools}).encode(), "f:7")
    assert json.dumps(conversation.tools) == json.dumps([tool.model_dump() for tool in request.tools or ()])
    ours = [turn.message() for turn in conversation.turns]
    assert ours == [{key: value for key, value in message.items() if value is not None} for message in theirs]


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array_is_read_and_its_items_are_named(tmp_path: Path, indent: int | None) -> None:
    items = [{"messages": [{"role": "user", "content": f"Wo steht Regal {n}? ä"}, GRADE]} for n in range(3)]
    data = tmp_path / "array.json"
    data.write_text(json.dumps(items, indent=indent, ensure_ascii=False))
    assert [conversation.turns[0] for _, conversation in read(data)] == [
        Turn("user", f"Wo steht Regal {n}? ä") for n in range(3)
    ]
    data.write_text(json.dumps([*items, {"prompt": SECRET}], indent=indent))
    with pytest.raises(DataError, match=r"array\.json:4: no kind of example") as caught:
        list(read(data))
    assert SECRET not in str(caught.value)


def test_a_gzipped_file_is_read_and_a_cut_one_named(tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl.gz"
    whole = gzip.compress(b'{"prompt": "p", "completion": "c"}\n' * 500)
    data.write_bytes(whole)
    assert len(list(read(data))) == 500
    data.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"train\.jsonl\.gz: .*copy it again"):
        list(read(data))


@pytest.mark.parametrize("indent", [1, 4, "\t"])
def test_json_over_several_lines_is_called_that_with_the_command_that_mends_it(
    tmp_path: Path, indent: int | str
) -> None:
    data = tmp_path / "pretty.json"
    example = {"prompt": SECRET, "completion": "c"}
    data.write_text("\n".join(json.dumps(example, indent=indent) for _ in range(2)))
    with pytest.raises(DataError, match=r"pretty\.json:1: .*several lines.*jq -c") as caught:
        list(read(data))
    assert SECRET not in str(caught.value)
