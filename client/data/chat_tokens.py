"""`ChatTokenizer`: turn a conversation into token ids and labels, by the chat template of the base's tokenizer."""

import json
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umbel.errors import ConfigError, DataError
from umbel.token_file import NO_LOSS

Turn = tuple[str, str]
"""(role, content)."""
Span = tuple[int, int]
"""(first, end) of an answer in the rendered text, in characters; `end` is excluded."""


@dataclass(frozen=True)
class ChatTokenizer:
    """The base's tokenizer, its chat template, and the tokens that may end an answer.

    >>> tokenizer = ChatTokenizer.load(Path("/models/Llama-3.1-8B-Instruct"))
    >>> ids, labels = tokenizer.encode([("user", "1 + 1 ="), ("assistant", "2")], "train.jsonl:1")
    """

    tokenizer: Any
    """A fast `transformers` tokenizer; only fast ones map each token to its characters."""
    template: str | None
    closing: frozenset[int]
    """Tokens that may end a turn: the end-of-sequence tokens and every special token."""

    @classmethod
    def load(cls, model: Path) -> "ChatTokenizer":
        """Load the tokenizer of a model directory; raise ConfigError when there is none, or only a slow one."""
        from transformers import AutoTokenizer  # seconds to import, needed only where data is prepared

        try:
            tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{model}: its tokenizer cannot be loaded; is tokenizer.json there and whole?") from error
        if not tokenizer.is_fast:
            raise ConfigError(f"{model}: only a slow tokenizer; convert it, so that the directory has a tokenizer.json")
        template = tokenizer.get_chat_template() if tokenizer.chat_template else None
        ends = {tokenizer.eos_token_id, *tokenizer.all_special_ids, *_ends_of_generation(model)}
        return cls(tokenizer, template, frozenset(ends - {None}))

    @property
    def pad_id(self) -> int:
        """The token that fills a row. It carries no loss, so any id will do where the tokenizer has no pad token."""
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(token for token in known if token is not None)

    def encode(self, turns: list[Turn], where: str) -> tuple[list[int], list[int]]:
        """Return (ids, labels) of equal length. A token of an answer has its id as label, any other token NO_LOSS.

        Raises DataError, naming `where`, when the template refuses the turns or does not show where an answer begins.
        """
        text, spans = self._render_plain(turns, where) if self.template is None else self._render_chat(turns, where)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids: list[int] = encoded["input_ids"]
        starts: list[int] = [start for start, _ in encoded["offset_mapping"]]
        labels = [NO_LOSS] * len(ids)
        for span in spans:
            first, end = self._tokens_of(text, span, ids, starts)
            labels[first:end] = ids[first:end]
        if labels:
            labels[0] = NO_LOSS  # nothing comes before it that could predict it
        return ids, labels

    def _tokens_of(self, text: str, span: Span, ids: list[int], starts: list[int]) -> tuple[int, int]:
        """Return (first, end) of an answer's tokens, from the first token in it up to the one that ends the turn.

        Templates put the ending token inside the answer, before a line break, or right behind the answer.
        """
        begin, end = span
        first = bisect_left(starts, begin)
        before_space = bisect_left(starts, begin + len(text[begin:end].rstrip()))
        if before_space > first and ids[before_space - 1] in self.closing:
            return first, before_space
        last = bisect_left(starts, end)
        return first, last + (last < len(ids) and ids[last] in self.closing)

    def _render_plain(self, turns: list[Turn], where: str) -> tuple[str, list[Span]]:
        """Render for a base without a chat template: the prompt, the answer and the end token, one after the other."""
        if [role for role, _ in turns] != ["user", "assistant"]:
            raise DataError(
                f"{where}: the base has no chat template, so it knows only a prompt and its completion; add a "
                "chat_template.jinja to the model directory, or write one prompt and completion per line"
            )
        bos = self.tokenizer.bos_token_id
        starts_with_bos = bos is not None and self.tokenizer("")["input_ids"][:1] == [bos]
        prompt = (self.tokenizer.bos_token if starts_with_bos else "") + turns[0][1]
        text = prompt + turns[1][1] + (self.tokenizer.eos_token or "")
        return text, [(len(prompt), len(text))]

    def _render_chat(self, turns: list[Turn], where: str) -> tuple[str, list[Span]]:
        text, spans = self._render(turns, where, add_generation_prompt=False)
        if spans is None:
            spans = [
                self._span(turns, index, text, where) for index, turn in enumerate(turns) if turn[0] == "assistant"
            ]
        return text, spans

    def _span(self, turns: list[Turn], index: int, text: str, where: str) -> Span:
        """Return the span of answer `index` for a template that marks none: the text it adds to the turns before."""
        before, _ = self._render(turns[:index], where, add_generation_prompt=True)
        after, _ = self._render(turns[: index + 1], where, add_generation_prompt=False)
        if not after.startswith(before) or not text.startswith(after):
            raise DataError(
                f"{where}: messages[{index}]: the chat template writes this answer in another way when it is the last "
                "turn, so its tokens cannot be told; write one line per answer, each ending with that answer, or mark "
                "answers in the template with {% generation %}"
            )
        return len(before), len(after)

    def _render(self, turns: list[Turn], where: str, *, add_generation_prompt: bool) -> tuple[str, list[Span] | None]:
        """Return the text, and the spans that the template marks with `{% generation %}`; None if it marks none."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        # Not apply_chat_template(return_assistant_tokens_mask=True): with tokenizers that trim offsets, its mask loses
        # an answer that begins with a space, and runs on to the end of the text after one that ends with a space.
        template = self.template or ""
        marked = "endgeneration" in template
        rendered: Any  # (texts, spans), one of each per conversation, although annotated as str
        try:
            rendered = render_jinja_template(
                [[{"role": role, "content": content} for role, content in turns]],
                chat_template=template,
                return_assistant_tokens_mask=marked,
                add_generation_prompt=add_generation_prompt,
                **self.tokenizer.special_tokens_map,
            )
        except TemplateError as error:
            # The message may quote an example, so it is repeated only where the template's author wrote it.
            said = f": {error}" if str(error) in template else ""
            raise DataError(
                f"{where}: the chat template refuses the turns{said}; check roles and their order"
            ) from error
        texts, spans = rendered
        return texts[0], list(spans[0]) if marked else None


def _ends_of_generation(model: Path) -> list[int]:
    """Return the end-of-sequence ids in generation_config.json; an instruct model may have several."""
    file = model / "generation_config.json"
    ends = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
    return ends if isinstance(ends, list) else [] if ends is None else [ends]
