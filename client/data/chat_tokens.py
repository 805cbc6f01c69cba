"""`ChatTokenizer`: turn a conversation into token ids and labels, each answer behind the prompt that the engine sends.

Prompt and answer are tokenised apart, because a model generates from the tokens of the prompt alone: were both one
text, the answer's beginning could grow together with the prompt's end, into a token that the engine never sees there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.data.base_tokenizer import load, stop_tokens, template_of
from client.data.chat_template import Answer, ChatTemplate
from client.data.conversation import Conversation
from umbel.errors import DataError
from umbel.token_file import NO_LOSS, LabelledTokens

Ids = list[int]
_ANCHORS = ("\n", "a", ".")
"""Texts in front of an answer, so that its tokens are those in the middle of a text, not at its beginning."""


@dataclass(frozen=True)
class Encoded:
    """The tokens of a conversation."""

    rows: tuple[LabelledTokens, ...]
    """(ids, labels), equally long: a prompt and its answer. A token of an answer, or of its end, has its id as label;
    any other token has NO_LOSS. Mostly one row holds all answers; an answer that would stand in another context than
    the engine's has a row of its own, before the others. Of a pair, the chosen and the rejected answer."""
    untold: int
    """Answers without a loss, because nothing comes before them that a user could send: a greeting."""


@dataclass(frozen=True)
class ChatTokenizer:
    """The base's tokenizer, its chat template, and the tokens that may end an answer.

    >>> tokenizer = ChatTokenizer.load(Path("/models/Llama-3.1-8B-Instruct"))
    >>> conversation = Conversation((Turn("user", "1 + 1 ="), Turn("assistant", "2")))
    >>> ((ids, labels),) = tokenizer.encode(conversation, "train.jsonl:1").rows
    """

    tokenizer: Any
    """A fast `transformers` tokenizer."""
    template: ChatTemplate | None
    stops: frozenset[int]
    """Tokens at which the engine ends an answer."""
    closing: frozenset[int]
    """Tokens that may end a turn: `stops`, and every token that the tokenizer calls special."""

    @classmethod
    def load(cls, model: Path) -> "ChatTokenizer":
        """Load the tokenizer of a model directory; raise ConfigError, naming the file, where it cannot be used."""
        tokenizer = load(model)
        stops = stop_tokens(tokenizer, model)
        flagged = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        return cls(tokenizer, template_of(tokenizer, model), stops, stops | flagged | {*tokenizer.all_special_ids})

    @property
    def pad_id(self) -> int:
        """The token that fills a row. It carries no loss, so any id will do where the tokenizer has no pad token."""
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(token for token in known if token is not None)

    def encode(self, conversation: Conversation, where: str) -> Encoded:
        """Return the tokens of a conversation with a loss on every answer and its end.

        Of a pair, the first row is the chosen answer behind the prompt, and the second one the rejected answer. Raises
        DataError, naming `where`, when the template refuses the turns, leaves one out, or does not show where an answer
        begins, and for a pair of which both sides are rendered the same.
        """
        if conversation.rejected is not None:
            chosen, rejected = (self.encode(side, where).rows for side in conversation.sides)
            if chosen == rejected:
                raise DataError(f"{where}: both answers of the pair are rendered the same; remove the line")
            return Encoded((*chosen, *rejected), 0)
        told = [index for index in conversation.answers if index > 0 or self.template is None]
        rows: list[tuple[Ids, Ids]] = []
        for index in reversed([index for index in told if conversation.turns[index].trained]):
            prompt, answer = self._answer(conversation, index, where)
            both = prompt + answer
            labels = next((labels for ids, labels in rows if ids[: len(both)] == both), None)
            if labels is None:
                rows.append((both, [NO_LOSS] * len(prompt) + answer))
            else:
                labels[len(prompt) : len(both)] = answer
        if not rows:
            raise DataError(f"{where}: no answer follows a turn that a user could send, so there is nothing to learn")
        return Encoded(tuple(reversed(rows)), len(conversation.answers) - len(told))

    def prompt_ids(self, prompt: str) -> Ids:
        """Return the engine's tokens of a prompt: rendered by the chat template, or plain text for a base without."""
        ids: Ids = self.tokenizer(prompt, add_special_tokens=self.template is None, verbose=False)["input_ids"]
        return ids

    def _answer(self, conversation: Conversation, index: int, where: str) -> tuple[Ids, Ids]:
        """Return the tokens of an answer's prompt and of the answer, up to the token that ends it."""
        if self.template is None:
            prompt, text = self._plain(conversation, where)
            ids = self.prompt_ids(prompt)
            if not ids:
                raise DataError(f"{where}: the prompt is empty, and a request cannot be; write one")
            end = self.tokenizer.eos_token_id
            return ids, self._continuation(prompt, ids, text, where) + ([] if end is None else [end])
        answer = self.template.answer(conversation, index, where)
        ids = self.prompt_ids(answer.prompt)
        written = self._continuation(answer.prompt, ids, answer.text, where)
        end = self._end(answer, written)
        if end is not None:
            return ids, written[:end]
        told, behind = answer.text[: len(answer.text) - answer.tail], answer.text[len(answer.text) - answer.tail :]
        stop = self.tokenizer.eos_token_id
        if behind.strip() or stop is None:  # the template ends answers with a text
            return ids, written
        return ids, [*self._continuation(answer.prompt, ids, told, where), stop]

    def _end(self, answer: Answer, ids: Ids) -> int | None:
        """Return the number of tokens up to the first one behind the answer that ends a turn, with that token.

        Special tokens are never part of another token, so the n-th token of a kind is the n-th occurrence of its text.
        """
        behind, place = len(answer.text) - answer.tail, 0
        for number, token in enumerate(ids, start=1):
            if token in self.closing:
                text = self.tokenizer.convert_ids_to_tokens(token)
                place = max(place, answer.text.find(text, place))
                if place >= behind:
                    return number
                place += len(text)
        return None

    def _continuation(self, prompt: str, prompt_ids: Ids, text: str, where: str) -> Ids:
        """Return the tokens of a text that follows a prompt, whose own tokens stay as they are."""
        whole = self.prompt_ids(prompt + text)
        if whole[: len(prompt_ids)] == prompt_ids:
            return whole[len(prompt_ids) :]
        expected = self.decode(whole)
        for anchor in ("", *_ANCHORS):
            before, with_anchor = self._ids(anchor), self._ids(anchor + text)
            ids = with_anchor[len(before) :]
            if with_anchor[: len(before)] == before and self.decode([*prompt_ids, *ids]) == expected:
                return ids
        raise DataError(
            f"{where}: an answer begins inside a token of this base, so it cannot follow its prompt; begin the answer "
            "with a word, and end the prompt without a space"
        )

    def _ids(self, text: str) -> Ids:
        ids: Ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, special ones visible."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    @staticmethod
    def _plain(conversation: Conversation, where: str) -> tuple[str, str]:
        """Return prompt and completion, the only conversation of a base without a chat template."""
        turns = conversation.turns
        if [turn.role for turn in turns] != ["user", "assistant"] or conversation.tools or turns[1].tool_calls:
            raise DataError(
                f"{where}: the base has no chat template, so it knows only a prompt and its completion; add a "
                "chat_template.jinja to the model directory, or write one prompt and completion per line"
            )
        return turns[0].content, turns[1].content
