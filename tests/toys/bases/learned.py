"""`Checked`: what an encoded conversation teaches, held against what the engine would be sent; `hold`: many of them."""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest
from hypothesis import HealthCheck, given, settings

from client.data.chat_tokens import ChatTokenizer, Encoded
from client.data.conversation import Conversation, Turn
from tests.toys.bases.chat_templates import ChatTemplate
from tests.toys.bases.conversations import conversations
from umbel.errors import DataError
from umbel.token_file import NO_LOSS

Span = tuple[int, int]
"""(first, end) of tokens that carry a loss, one after the other."""


@dataclass(frozen=True)
class Base:
    """A model directory as training reads it, and as the engine does."""

    training: ChatTokenizer
    engine: Any
    """The tokenizer that SGLang's own loader makes."""

    @classmethod
    def load(cls, model: Path) -> Self:
        """Load both."""
        from sglang.srt.utils.hf_transformers.tokenizer import get_tokenizer

        return cls(ChatTokenizer.load(model), get_tokenizer(str(model)))

    def prompt(self, turns: Sequence[Turn], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """Return the tokens that the engine makes of the turns before an answer."""
        calls = [{"tool_calls": list(turn.tool_calls)} if turn.tool_calls else {} for turn in turns]
        messages = [
            {"role": turn.role, "content": turn.content} | more for turn, more in zip(turns, calls, strict=True)
        ]
        ids: list[int] = self.engine.apply_chat_template(
            messages, tools=list(tools) or None, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, with the special ones."""
        return str(self.engine.decode(ids, skip_special_tokens=False))

    def learnt(self, encoded: Encoded) -> list[str]:
        """Return the text of each stretch that has a loss, row by row."""
        return [self.text_of(ids, span) for ids, labels in encoded.rows for span in spans(labels)]

    def text_of(self, ids: Sequence[int], span: Span) -> str:
        """Return the text of a stretch of a row: what it adds to the text before it."""
        before, after = (self.decode(ids[:end]) for end in span)
        assert after.startswith(before)
        return after[len(before) :]


def spans(labels: Sequence[int]) -> list[Span]:
    """Return the stretches of tokens with a loss."""
    found: list[Span] = []
    for place, label in enumerate(labels):
        if label != NO_LOSS and found and found[-1][1] == place:
            found[-1] = (found[-1][0], place + 1)
        elif label != NO_LOSS:
            found.append((place, place + 1))
    return found


def same(text: str) -> str:
    """Return a text as tokenizers that compose letters give it back."""
    return unicodedata.normalize("NFC", text)


@dataclass(frozen=True)
class Checked:
    """The stretches with a loss of all rows, by the answer that each of them is."""

    said: dict[int, str]
    """Index of the answer's turn → text with a loss."""
    rows: list[str]
    """All rows as texts."""

    @classmethod
    def of(cls, conversation: Conversation, base: Base) -> Self:
        """Encode a conversation and tell its stretches apart by the engine's prompt that is before each of them.

        Fails where a stretch follows anything else, where an answer is there twice, and where a row has none.
        """
        encoded = base.training.encode(conversation, "f:7")
        greeted = conversation.turns[0].role == "assistant"
        assert encoded.untold == greeted
        prompts = {
            tuple(base.prompt(conversation.turns[:index], conversation.tools)): index
            for index in conversation.answers[greeted:]
        }
        said: dict[int, str] = {}
        for ids, labels in encoded.rows:
            assert all(label in (NO_LOSS, token) for token, label in zip(ids, labels, strict=True))
            stretches = spans(labels)
            assert stretches, "a row without a loss"
            for first, end in stretches:
                index = prompts.get(tuple(ids[:first]))
                assert index is not None, f"after what no engine is sent: {base.decode(ids[:first])!r}"
                assert index not in said, f"answer {index} twice"
                said[index] = base.text_of(ids, (first, end))
        return cls(said, [base.decode(ids) for ids, _ in encoded.rows])

    def require(self, conversation: Conversation, template: ChatTemplate) -> None:
        """Fail unless each answer with a loss is there as the template writes it, with its end, and no turn is lost."""
        turns = conversation.turns
        wanted = [index for index in conversation.answers if turns[index].trained and index]
        assert sorted(self.said) == wanted
        for index, text in self.said.items():
            right = [head + written(turns[index].content) + template.end for head, written in template.forms]
            assert same(text) in map(same, right), (text, right)
        if template.own_rows(turns):
            assert len(self.rows) == len(wanted)
        text, place = same(self.rows[-1]), 0
        for turn in turns:
            wrote = same(turn.content.strip())
            if turn.role == "user":
                found = text.find(wrote, place)
                assert found >= 0, (wrote, text)
                place = found + len(wrote)
            assert turn.role != "system" or wrote in text, (wrote, text)


def hold(base: Base, template: ChatTemplate, examples: int) -> Counter[str]:
    """Check random conversations; return how many were trained, and how many refused, as the template has to."""
    seen: Counter[str] = Counter()

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
    )  # fmt: skip
    @given(conversation=conversations())
    def check(conversation: Conversation) -> None:
        if template.refuses(conversation.turns):
            with pytest.raises(DataError, match=r"^f:7: "):
                base.training.encode(conversation, "f:7")
            seen["refused"] += 1
            return
        Checked.of(conversation, base).require(conversation, template)
        seen["trained"] += 1

    check()
    return seen
