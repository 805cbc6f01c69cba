"""Each example as it is trained on: its text in stretches, what carries a loss, what is cut or refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from client.data.chat_tokens import ChatTokenizer
from client.data.inspection import Inspected, inspect, prompt, stretches, trained
from tests.toys.bases.chat_templates import TEMPLATES, chat_model, with_template
from umbel.errors import DataError
from umbel.token_file import NO_LOSS

ASKED = [{"role": "user", "content": "knee?"}, {"role": "assistant", "content": "Ward 7."}]
MORE = [*ASKED, {"role": "user", "content": "eye?"}, {"role": "assistant", "content": "Ward 2."}]


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> ChatTokenizer:
    return ChatTokenizer.load(tiny_llama)


def written(path: Path, *examples: Any) -> Path:
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in examples))
    return path


def only(path: Path, tokenizer: ChatTokenizer, seq_len: int = 512) -> Inspected:
    (example,) = inspect(path, tokenizer, seq_len)
    return example


def test_prompt_and_answers_are_told_apart_in_the_order_of_the_file(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    file = written(tmp_path / "data.jsonl", {"messages": MORE}, "", {"prompt": "a ", "completion": "b"})
    first, second = inspect(file, tokenizer, 512)
    assert (first.number, second.number) == (1, 3), "a blank line is no example, and counts as a line"
    assert prompt(first, tokenizer) == "<|user|>knee?<|end|><|assistant|>"
    assert trained(first, tokenizer) == ["Ward 7.<|end|>", "Ward 2.<|end|>"]
    assert (prompt(second, tokenizer), trained(second, tokenizer)) == ("<|user|>a <|end|><|assistant|>", ["b<|end|>"])
    ((ids, labels),) = first.whole
    assert first.tokens == len(ids)
    assert first.loss_tokens == sum(label != NO_LOSS for label in labels)
    shown = stretches(first.whole[0], tokenizer, 512)
    assert "".join(stretch.text for stretch in shown) == (
        "<|user|>knee?<|end|><|assistant|>Ward 7.<|end|><|user|>eye?<|end|><|assistant|>Ward 2.<|end|>"
    )
    assert [token for stretch in shown for token in stretch.ids] == ids
    assert [stretch.loss for stretch in shown] == [False, True, False, True]


def test_what_seq_len_takes_carries_no_loss_and_is_told(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    file = written(tmp_path / "data.jsonl", {"messages": MORE})
    whole = only(file, tokenizer)
    begins = stretches(whole.whole[0], tokenizer, 512)[3].first
    exact = only(file, tokenizer, whole.tokens)
    assert (exact.cut, exact.dropped) == (False, False)
    inside = only(file, tokenizer, begins + 1)
    assert (inside.cut, inside.dropped, inside.tokens) == (True, False, whole.tokens)
    one, two = trained(inside, tokenizer)
    assert one == "Ward 7.<|end|>"
    assert two != ""
    assert "Ward 2.<|end|>".startswith(two)
    *before, last = stretches(inside.whole[0], tokenizer, begins + 1)
    assert (last.cut, last.loss, any(stretch.cut for stretch in before)) == (True, False, False)
    assert two + last.text == "Ward 2.<|end|>"
    nothing = only(file, tokenizer, 4)
    assert (nothing.cut, nothing.dropped, trained(nothing, tokenizer)) == (True, True, [])
    assert nothing.loss_tokens == 0
    assert prompt(nothing, tokenizer) == prompt(whole, tokenizer)


def test_an_example_of_several_rows_is_shown_once_per_answer(tiny_llama: Path, tmp_path: Path) -> None:
    tokenizer = ChatTokenizer.load(chat_model(tiny_llama, TEMPLATES["mistral-like"], tmp_path / "model"))
    system = {"role": "system", "content": "Be brief."}
    example = only(written(tmp_path / "data.jsonl", {"messages": [system, *MORE]}), tokenizer)
    assert len(example.whole) == 2, "this template writes the system turn into the last question"
    assert trained(example, tokenizer) == ["Ward 7.</s>", "Ward 2.</s>"]
    assert prompt(example, tokenizer) == "<s>[INST]Be brief.\n\nknee?[/INST]"
    assert example.tokens == max(len(ids) for ids, _ in example.whole)


def test_refused_examples_have_a_reason_and_no_text_whether_the_file_or_the_template_refuses(
    tiny_llama: Path, tmp_path: Path
) -> None:
    tokenizer = ChatTokenizer.load(chat_model(tiny_llama, TEMPLATES["mistral-like"], tmp_path / "model"))
    twice = [ASKED[0], *ASKED]
    file = written(tmp_path / "data.jsonl", "no JSON", {"messages": twice}, {"messages": ASKED})
    by_file, by_template, good = inspect(file, tokenizer, 512)
    assert (by_file.reason(file) or "").startswith("not JSON (")
    assert "user and assistant must take turns" in (by_template.reason(file) or "")
    assert good.reason(file) is None
    for example in (by_file, by_template):
        assert isinstance(example.refused, DataError)
        assert str(example.refused).startswith(f"{file}:{example.number}: ")
        assert (prompt(example, tokenizer), trained(example, tokenizer), example.tokens) == (None, [], 0)
        assert (example.cut, example.dropped) == (False, False)


def test_a_base_without_a_template_shows_prompt_and_completion(tiny_llama: Path, tmp_path: Path) -> None:
    tokenizer = ChatTokenizer.load(with_template(tiny_llama, None, tmp_path / "model"))
    example = only(written(tmp_path / "data.jsonl", {"prompt": "1 + 1 =", "completion": " 2"}), tokenizer)
    assert (prompt(example, tokenizer), trained(example, tokenizer)) == ("1 + 1 =", [" 2<|end|>"])


def test_a_space_that_a_tokenizer_writes_only_between_words_is_in_the_stretch(tokenizer: ChatTokenizer) -> None:
    words = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "▁c": 2}, unk_token="▁a"))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.decoder = decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=words)  # type: ignore[no-untyped-call]
    assert fast.decode([1]) == "b", "alone it loses its space"
    shown = stretches(([0, 1, 2], [NO_LOSS, 1, NO_LOSS]), replace(tokenizer, tokenizer=fast), 8)
    assert [stretch.text for stretch in shown] == ["a", " b", " c"]
