"""Pairs of answers: read in every shape, rendered as served, kept whole, and never among examples of the other kind."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from client.data.chat_tokens import ChatTokenizer
from client.data.conversation import Conversation, Turn, content_of, group_of
from client.data.examples import parse
from client.data.inspection import inspect, trained
from client.data.prepare import Preparation, Prepared, prepare
from client.data.summary import DATA, EVAL_DATA, RELEASED
from client.data.survey import survey, survey_adapter
from tests.toys.sites.site_file import GUARD, load
from tests.toys.sites.training_data import SECRET, write_lines
from umbel.errors import DataError
from umbel.token_file import NO_LOSS, TokenFile

ASKED, GOOD, BAD = "which ward", "ward 7", "no idea"
USER, CHOSEN, REJECTED = (
    {"role": r, "content": c} for r, c in (("user", ASKED), ("assistant", GOOD), ("assistant", BAD))
)
EARLIER = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> ChatTokenizer:
    return ChatTokenizer.load(tiny_llama)


def read(example: dict[str, Any]) -> Conversation:
    return parse(json.dumps(example).encode(), "f:1")


def write(path: Path, examples: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    return path


def pairs(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"{ASKED} {n}", "chosen": GOOD, "rejected": BAD, **more} for n in range(count)]


@pytest.mark.parametrize(
    "example",
    [
        {"prompt": ASKED, "chosen": GOOD, "rejected": BAD},
        {"prompt": [USER], "chosen": [CHOSEN], "rejected": [REJECTED], "score_chosen": 4.5, "score_rejected": 1.0},
        {"prompt": ASKED, "chosen": CHOSEN, "rejected": BAD, "tools": []},
        {"chosen": [USER, CHOSEN], "rejected": [USER, REJECTED]},
        {"messages": [USER], "chosen": CHOSEN, "rejected": REJECTED},
        {"conversations": [{"from": "human", "value": ASKED}], "chosen": {"from": "gpt", "value": GOOD},
         "rejected": BAD},
        {"input": {"messages": [USER], "tools": [], "parallel_tool_calls": True},
         "preferred_output": [CHOSEN], "non_preferred_output": [REJECTED]},
    ],
    ids=["texts", "messages", "mixed", "whole conversations", "beside messages", "ShareGPT", "OpenAI"],
)  # fmt: skip
def test_every_shape_is_the_same_pair(example: dict[str, Any]) -> None:
    plain = Conversation((Turn("user", ASKED), Turn("assistant", GOOD)), rejected=Turn("assistant", BAD))
    assert read(example) == plain
    assert read({**example, "group": 7}) == replace(plain, group="7")
    if "input" not in example:
        assert read({**example, "system": "s"}).turns == (Turn("system", "s"), *plain.turns)


@pytest.mark.parametrize(
    ("example", "says"),
    [
        ({"prompt": SECRET, "chosen": GOOD}, 'no kind of example; .*"chosen" and "rejected"'),
        ({"prompt": SECRET, "chosen": GOOD, "rejectd": BAD}, 'did you mean "rejected" by "rejectd"'),
        ({"prompt": SECRET, "chosen": GOOD, "rejected": BAD, "completion": "x"}, "more than one kind"),
        ({"prompt": SECRET, "chosen": GOOD, "rejected": " "}, "rejected: the answer is empty"),
        ({"prompt": SECRET, "chosen": 3, "rejected": BAD}, '"chosen" is a number'),
        ({"prompt": SECRET, "chosen": [USER, CHOSEN], "rejected": [REJECTED]}, '"chosen" has 2 turns; write what is'),
        ({"prompt": SECRET, "chosen": [USER], "rejected": BAD}, r'chosen\[0\] has the role "user"'),
        ({"prompt": SECRET, "chosen": {**CHOSEN, "weight": 0}, "rejected": BAD}, 'chosen.* has "weight": 0'),
        ({"chosen": [USER, CHOSEN], "rejected": [*EARLIER, USER, REJECTED]}, "differ before their last turns"),
        ({"chosen": SECRET, "rejected": BAD}, '"chosen" is a string; expected a list of messages'),
        ({"prompt": EARLIER, "chosen": GOOD, "rejected": BAD}, "an answer follows an answer"),
        ({"prompt": SECRET, "chosen": GOOD, "rejected": BAD, "history": [["a", "b"]]}, '"history" is no known field'),
        ({"input": SECRET, "preferred_output": [CHOSEN], "non_preferred_output": [REJECTED]}, '"input" is a string'),
        ({"input": {"messages": [USER], "n": 2}, "preferred_output": [CHOSEN], "non_preferred_output": [REJECTED]},
         'input: "n" is no known field'),
    ],
)  # fmt: skip
def test_what_is_unclear_is_refused_by_name(example: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=rf"^f:1: .*{says}") as caught:
        read(example)
    assert SECRET not in str(caught.value)


def test_both_answers_stand_behind_the_prompt_that_is_served(tokenizer: ChatTokenizer) -> None:
    """Only the two answers carry a loss, as an example with one answer has it; an earlier answer is read."""
    pair = read({"prompt": [*EARLIER, USER], "chosen": GOOD, "rejected": BAD})
    rows = tokenizer.encode(pair, "f:1").rows
    for (ids, labels), answer in zip(rows, (CHOSEN, REJECTED), strict=True):
        alone = read({"messages": [EARLIER[0], {**EARLIER[1], "weight": 0}, USER, answer]})
        assert tokenizer.encode(alone, "f:1").rows == ((ids, labels),)
        assert tokenizer.decode([label for label in labels if label != NO_LOSS]).startswith(answer["content"])


def test_contents_differ_by_both_answers_and_groups_by_what_is_asked() -> None:
    one, other = read(pairs(1)[0]), read({**pairs(1)[0], "rejected": "it is closed"})
    assert content_of(one) != content_of(other)
    assert group_of(one) == group_of(other) == group_of(read({"prompt": f"{ASKED} 0", "completion": "x"}))
    assert content_of(one.sides[0]) != content_of(one)


def test_answers_that_are_rendered_the_same_are_refused(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    file = write(tmp_path / "data.jsonl", [{"prompt": ASKED, "chosen": GOOD, "rejected": GOOD}])
    (example,) = inspect(file, tokenizer, 64)
    assert example.reason(file) == "both answers of the pair are rendered the same; remove the line"


def test_seq_len_takes_both_answers_or_none(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    """Where one answer begins behind it, and where the answers differ only behind it."""
    words = "one two three four five six seven eight"
    file = write(
        tmp_path / "data.jsonl", [*pairs(1), {"prompt": ASKED, "chosen": words + " nine", "rejected": words + " ten"}]
    )
    whole, alike = inspect(file, tokenizer, 512)
    begins = min(next(n for n, label in enumerate(labels) if label != NO_LOSS) for _, labels in whole.whole)
    for seq_len in range(1, 64):
        for example in (whole, alike):
            cut = replace(example, seq_len=seq_len)
            assert len(cut.rows) in (0, 2)
            assert cut.dropped == (not cut.rows)
    assert replace(whole, seq_len=begins).dropped
    assert replace(alike, seq_len=alike.tokens - 4).dropped
    assert not replace(alike, seq_len=alike.tokens).dropped


@pytest.mark.parametrize(("first", "says"), [("pair", "one answer among pairs"), ("answer", "a pair of answers among")])
def test_a_file_has_one_kind(tokenizer: ChatTokenizer, tmp_path: Path, first: str, says: str) -> None:
    both = [pairs(1)[0], {"prompt": "a", "completion": "b"}]
    file = write(tmp_path / "data.jsonl", both if first == "pair" else both[::-1])
    found = survey(file, tokenizer, 64)
    assert (found.pairs, len(found.examples)) == (first == "pair", 1)
    (mistake,) = found.mistakes()
    assert str(mistake).startswith(f"{file}:2: {says}")
    assert "objective = " in str(mistake)


def prepared(folder: Path, model: Path, data: Path, **files: Any) -> Prepared:
    return prepare(Preparation(data, files.pop("eval_data", None), 0.3, model, 64, folder / "tokens", **files))


def test_token_files_hold_chosen_and_rejected_in_turn(
    tiny_llama: Path, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    data = write(tmp_path / "data.jsonl", [*pairs(20), *pairs(2)])
    guard = write_lines(tmp_path / "guard.jsonl", [("1 + 1 =", "2")])
    done = prepared(tmp_path, tiny_llama, data, guards={"sums": guard})
    assert (done.objective, done.pairs) == ("dpo", ["train", "eval"]), "a guard is of its own kind"
    assert done.clusters == {"eval": list(range(done.eval_examples)), "guard-sums": [0]}
    assert done.held["held_examples"] + done.eval_examples == 20
    for file, examples in ((done.train, done.train_examples), (done.eval, done.eval_examples)):
        tokens = TokenFile.open(file)
        assert len(tokens) == 2 * examples > 0
        for row, length in enumerate(tokens.lengths):
            text = tokenizer.decode([token for token in tokens.labels[row, :length] if token != NO_LOSS])
            assert text.startswith((GOOD, BAD)[row % 2])
    assert done.train_loss_tokens == TokenFile.open(done.train).loss_tokens()


def test_held_out_examples_are_of_the_kind_of_the_data(tiny_llama: Path, tmp_path: Path) -> None:
    data, other = write(tmp_path / "data.jsonl", pairs(3)), write_lines(tmp_path / "eval.jsonl", [("a", "b")])
    with pytest.raises(DataError, match=r"eval.jsonl:1: one answer among pairs"):
        prepared(tmp_path, tiny_llama, data, eval_data=other)
    with pytest.raises(DataError, match=r"data.jsonl:1: a pair of answers among"):
        prepared(tmp_path, tiny_llama, other, eval_data=data)


def test_a_site_is_told_of_both(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    for folder in ("private", "guards"):
        (tmp_path / folder).mkdir()
    write(tmp_path / "private" / "train.jsonl", pairs(3))
    write_lines(tmp_path / "guards" / "triage.jsonl", [("c", "d")])
    write_lines(tmp_path / "eval.jsonl", [("a", "b")])
    found = survey_adapter(load(tmp_path, training='eval_data = "eval.jsonl"', more=GUARD), "support", tokenizer)
    assert list(found.mistakes) == [EVAL_DATA]
    assert found.files[DATA].pairs


def test_what_users_gave_is_used_as_the_data_has_it(tiny_llama: Path, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    """For pairs, pairs; for examples with one answer, the chosen ones, too. What does not fit is counted."""
    given = write(tmp_path / "released.jsonl", [pairs(1, group="new")[0], {"prompt": "what", "completion": "that"}])
    one = prepared(tmp_path, tiny_llama, write(tmp_path / "pairs.jsonl", pairs(3)), released=given)
    assert (one.files[RELEASED].refused, one.files[RELEASED].usable) == (1, 1)
    answers = write_lines(tmp_path / "answers.jsonl", [("a", "b"), ("c", "d")])
    other = prepared(tmp_path, tiny_llama, answers, released=given)
    assert (other.objective, other.files[RELEASED].refused) == ("sft", 0)
    tokens = TokenFile.open(other.train)
    texts = [tokenizer.decode([token for token in labels if token != NO_LOSS]) for labels in tokens.labels]
    assert len(texts) == other.train_examples == 3
    assert sum(text.startswith(GOOD) for text in texts) == 1
    assert not any(text.startswith(BAD) for text in texts)


def test_both_answers_are_shown_as_trained(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    (example,) = inspect(write(tmp_path / "data.jsonl", pairs(1)), tokenizer, 64)
    chosen, rejected = trained(example, tokenizer)
    assert (chosen[: len(GOOD)], rejected[: len(BAD)]) == (GOOD, BAD)
