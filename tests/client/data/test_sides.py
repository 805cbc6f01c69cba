"""What is asked is never trained on, in whatever form it comes again; what belongs together counts once."""

import json
from pathlib import Path
from typing import Any

import pytest

from client.data.chat_tokens import ChatTokenizer
from client.data.conversation import content_of, group_of
from client.data.examples import parse
from client.data.inspection import Inspected
from client.data.prepare import Preparation, prepare
from client.data.sides import Sides, clusters, counts_as, digest, sides
from client.data.summary import DATA, EVAL_DATA, HELD_OUT, RELEASED
from client.data.survey import survey
from umbel.errors import DataError
from umbel.token_file import TokenFile

Example = dict[str, Any]


def pair(prompt: str, completion: str = "yes", **more: Any) -> Example:
    return {"prompt": prompt, "completion": completion, **more}


def chat(*turns: str, system: str = "", **more: Any) -> Example:
    """A conversation of user and assistant in turn."""
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]
    return {"messages": [*([{"role": "system", "content": system}] if system else []), *messages], **more}


def group(example: Example) -> str:
    return group_of(parse(json.dumps(example).encode(), "f:1"))


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> ChatTokenizer:
    return ChatTokenizer.load(tiny_llama)


@pytest.fixture
def split(tokenizer: ChatTokenizer, tmp_path: Path) -> Any:
    """Return a function that puts examples on their sides, as preparation does."""

    def found(fraction: float | None = None, **files: list[Example]) -> Sides:
        names = {"data": DATA, "eval_data": EVAL_DATA, "released": RELEASED}
        read: dict[str, list[Inspected]] = {}
        for name, examples in files.items():
            path = tmp_path / f"{name}.jsonl"
            path.write_text("".join(json.dumps(example) + "\n" for example in examples))
            read[names.get(name, f"guard {name}")] = survey(path, tokenizer, 64).examples
        return sides(read, fraction)

    return found


SAME = [
    pair("Which  ward\ttakes knees? "), pair("WHICH WARD TAKES KNEES?"), pair("Which ward takes knees?", "no"),
    pair("\uff37hich ward takes \uff4bnees?"), pair("Which ward takes knees?", system="You are the desk."),
    chat("Which ward takes knees?", "Ward 7.", "And eyes?", "Ward 2."),
    chat("which ward takes knees?", "Ward 7.", "And eyes?", "Ward 2.", "Thanks", "Welcome", system="Be brief."),
    {"instruction": "Which ward takes knees?", "output": "7", "history": []},
]  # fmt: skip


@pytest.mark.parametrize("other", SAME)
def test_the_same_question_is_one_group_in_whatever_form(other: Example) -> None:
    assert group(other) == group(pair("Which ward takes knees?"))
    assert group(other) != group(pair("Which ward takes eyes?"))


def test_a_named_group_is_what_an_example_is_about(split: Any) -> None:
    assert group(pair("hi", group="a")) == group(chat("bye", "x", group="a")) != group(pair("hi"))
    assert group(pair("hi", group="7")) == group(pair("hi", group=7)) == group(pair("hi", group=7.0))
    assert group(pair("hi", group="")) == group(pair("hi", group=None)) == group(pair("hi"))
    assert group(pair("a")) != group(pair("b", group="a")), "a name is no question"
    one, two = (parse(json.dumps(pair("hi", group=name)).encode(), "f:1") for name in "ab")
    assert content_of(one) == content_of(two), "and no text of the example"
    greetings = [chat("hi", f"answer {n}", group=str(n)) for n in range(9)]
    found = split(data=greetings, eval_data=[*greetings[:2], chat("hi", "another", group="3")])
    assert (len(found.train), found.withheld) == (6, {DATA: 3}), "a third of them is asked, as its group is"


def test_without_a_user_what_comes_before_the_answer_counts() -> None:
    one, again, other = (
        {"messages": [{"role": "system", "content": text}, {"role": "assistant", "content": answer}]}
        for text, answer in (("Say hello", "Hello"), ("say  hello", "Hi"), ("Say bye", "Bye"))
    )
    assert group(one) == group(again) != group(other)


@pytest.mark.parametrize("value", [True, [1], {"a": 1}, 1.5, float("nan")])
def test_a_group_that_is_no_name_is_refused(value: object) -> None:
    with pytest.raises(DataError, match=r'f:1: "group" is .*; name the group by a text or a whole number'):
        parse(json.dumps(pair("a", group=value)).encode(), "f:1")


def test_what_asks_is_trained_on_in_no_form_and_counted_by_file(split: Any) -> None:
    data = [pair(f"question {n}") for n in range(100)]
    found = split(data=data, eval_data=[pair(f"QUESTION {n}", "no") for n in range(40)], triage=data[40:80])
    assert (len(found.train), found.withheld) == (20, {DATA: 80})
    given = [chat("question  3", "yes"), chat("new", "yes")]
    found = split(data=data[50:], eval_data=data[:40], released=given)
    assert (len(found.train), found.withheld) == (51, {RELEASED: 1})


@pytest.mark.parametrize("other", SAME)
def test_a_split_tears_no_question_apart(split: Any, other: Example) -> None:
    change = {key: value for key, value in other.items() if key not in ("prompt", "completion", "messages")}
    twins = [{**pair(f"Question {n}?"), **change} for n in range(60) if "instruction" not in change]
    twins += [chat(f"question  {n}?", "a", "b", "c") for n in range(0, 60, 2)]
    found = split(0.3, data=[pair(f"question {n}?") for n in range(60)] + twins)
    assert not {example.group for example in found.train} & {example.group for example in found.asking[HELD_OUT]}
    assert found.train
    assert found.asking[HELD_OUT]


def test_each_content_is_asked_once_and_each_question_counts_once(split: Any, tiny_llama: Path) -> None:
    lines = [pair(f"question {n % 7}", f"answer {n % 14}") for n in range(70)]
    found = split(data=[pair("other")], eval_data=lines, triage=lines)
    for name in (HELD_OUT, "guard triage"):
        asked = found.asked[name]
        assert asked.examples == 14, "ten of each were given"
        assert asked.counts_as == pytest.approx(7, rel=0.1)
    assert clusters(found.asking[HELD_OUT]) == [n % 7 for n in range(14)]


def test_answers_of_very_different_length_count_as_fewer(split: Any) -> None:
    found = split(data=[pair("x")], eval_data=[pair(str(n), "long " * (25 if n < 2 else 1)) for n in range(30)])
    assert counts_as(found.asking[HELD_OUT]) < 15


def test_a_set_is_known_by_what_it_asks_and_not_by_order_or_answers(split: Any) -> None:
    first, again, more = (
        digest(split(data=[pair("x")], eval_data=examples).asking[HELD_OUT])
        for examples in (
            [pair("a"), pair("b")], [pair("B", "no"), pair(" a"), pair("a", "perhaps")], [pair("a"), pair("c")],
        )
    )  # fmt: skip
    assert first == again != more


def test_nothing_left_to_train_on_is_refused_by_name(tiny_llama: Path, tmp_path: Path) -> None:
    data, held_out = tmp_path / "data.jsonl", tmp_path / "eval.jsonl"
    data.write_text("".join(json.dumps(chat("hi", f"answer {n}")) + "\n" for n in range(5)))
    held_out.write_text(json.dumps(chat("Hi", "hello")))
    wanted = Preparation(data, held_out, 0.1, tiny_llama, 64, tmp_path / "tokens")
    with pytest.raises(DataError, match=r'data\.jsonl: no example is left.*all 5; .* give each conversation a "group"'):
        prepare(wanted)
    data.write_text("".join(json.dumps(chat("hi", f"answer {n}", group=n)) + "\n" for n in range(5)))
    done = prepare(wanted)
    assert (done.train_examples, done.withheld) == (5, {})
    assert len(TokenFile.open(done.eval)) == len(done.clusters["eval"]) == 1


def test_a_guard_that_asks_nothing_of_its_own_is_known_by_what_asks_it(split: Any) -> None:
    asked, few = [pair(f"{n}?") for n in range(6)], [pair(f" {n}? ", "no") for n in range(3)]
    found: Sides = split(
        data=[pair("a?")], eval_data=asked, same=asked, few=few, other=[pair("b?")], again=[pair("B?")]
    )
    assert {name: one.twin for name, one in found.asked.items()} == {
        HELD_OUT: "", "guard same": HELD_OUT, "guard few": HELD_OUT, "guard other": "", "guard again": "guard other",
    }  # fmt: skip
    assert split(data=[pair("a?")], eval_data=[], empty=[]).asked["guard empty"].twin == "", "one without any is short"
