"""`ChatTemplate`: render a conversation as SGLang does, and tell the text of an answer from that of its prompt.

An answer is what follows the prompt that the engine would send for it: the text that the template adds to the turns
before, or, where the template writes those turns in another way once an answer follows them, the answer as it was
written and what the template puts behind an answer.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from client.data import stand_ins
from client.data.conversation import Conversation, Turn
from client.data.stand_ins import StandIns, Tools
from umbel.errors import ConfigError, DataError

THOUGHT = "<think>"
"""Text that begins the thoughts before an answer, in the templates of all models that have them."""
_THOUGHTS = re.compile(r"</?think>")


@dataclass(frozen=True)
class Answer:
    """Prompt and answer as texts, with everything that the template writes around them."""

    prompt: str
    """Text that the engine is given."""
    text: str
    """Text that the engine should generate, and what the template writes behind it."""
    tail: int
    """Length of the part of `text` that stands behind the answer itself: its end, and often a line break."""


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template, the special tokens that it may name, and the file that it comes from.

    >>> template = ChatTemplate(text, {"bos_token": "<s>"}, Path("/models/base/chat_template.jinja"))
    >>> template.answer(Conversation((Turn("user", "1 + 1 ="), Turn("assistant", "2"))), 1, "train.jsonl:1")
    Answer(prompt='<|user|>1 + 1 =<|end|><|assistant|>', text='2<|end|>', tail=7)
    """

    text: str
    special_tokens: dict[str, Any]
    file: Path
    _kept: set[tuple[object, ...]] = field(default_factory=set, compare=False)
    """Kinds of conversations of which the template is known to write everything."""

    def __post_init__(self) -> None:
        """Raise ConfigError for a template that does not parse, or that cannot render the simplest conversation."""
        simple = (Turn("user", "a"), Turn("assistant", "b"))
        said = []
        for turns in (simple, (Turn("system", "c"), *simple)):
            try:
                self.render(turns, (), "", prompt=False)
                return
            except DataError as error:
                said.append(str(error).removeprefix(": "))
        raise ConfigError(f"{self.file}: cannot render a question and its answer: {said[0]}; copy the file again")

    def render(self, turns: Sequence[Turn], tools: Tools, where: str, *, prompt: bool) -> str:
        """Return the text of turns, as a prompt for the next answer or without one; raise DataError if it refuses."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        messages = [turn.message() for turn in turns]
        try:
            rendered: Any = render_jinja_template(
                [messages],
                tools=list(tools) or None,
                chat_template=self.text,
                add_generation_prompt=prompt,
                **self.special_tokens,
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            # The message may quote an example, so it is repeated only where the template's author wrote it.
            said = f": {error}" if str(error) in self.text or where == "" else ""
            raise DataError(
                f"{where}: the chat template refuses the turns{said}; check roles and their order"
            ) from error
        return str(rendered[0][0])

    def answer(self, conversation: Conversation, index: int, where: str) -> Answer:
        """Return the answer of turn `index` and its prompt; raise DataError if the template leaves a turn out."""
        turns, tools = conversation.turns[:index], conversation.tools
        answer = conversation.turns[index]
        prompt = self.render(turns, tools, where, prompt=True)
        stand_in = stand_ins.content(index)
        told = self.render((*turns, Turn("assistant", stand_in)), tools, where, prompt=False)
        head, found, tail = told.partition(stand_in)
        if not found or stand_in in tail:
            raise DataError(f"{where}: messages[{index}]: the chat template does not write the answer; see {self.file}")
        whole = self.render((*turns, answer), tools, where, prompt=False)
        text = whole.removeprefix(prompt) if whole.startswith(prompt) else ""
        if not text.endswith(tail) or not all(_contains(text, part) for part in _THOUGHTS.split(answer.content)):
            text = _between(prompt, head) + _as_written(answer, whole, head, tail, prompt)
        self._require_kept(conversation, index, prompt, text, where)
        if not text.endswith(tail):  # a call may end in another way than a text: behind its last name
            return Answer(prompt, text, len(text) - max(text.rfind(name) for name in _called(answer)))
        return Answer(prompt, text, len(tail))

    def _require_kept(self, conversation: Conversation, index: int, prompt: str, text: str, where: str) -> None:
        """Raise DataError unless all that was written in the turns up to an answer is in its prompt and text."""
        turns, tools = conversation.turns[: index + 1], conversation.tools
        for number, turn in enumerate(turns[:index]):
            thoughtless = _THOUGHTS.split(turn.content)[-1] if turn.role == "assistant" else turn.content
            if not _contains(prompt, thoughtless):
                raise DataError(self._leaves_out(turn, number, where))
        if not _contains(text, turns[index].reasoning_content or ""):
            raise DataError(self._leaves_out(turns[index], index, where))
        kind = StandIns.kind(turns, tools)
        if kind in self._kept:
            return
        places = StandIns.of(turns, tools)
        shown = self.render(places.turns[:-1], places.tools, where, prompt=True)
        if not places.tools_are_in(shown):
            raise DataError(
                f'{where}: "tools": the chat template has no place for tools, so the engine would not tell the '
                f"model of them; remove them, or use a base whose template takes tools (see {self.file})"
            )
        lacks = places.prompt_lacks(shown)
        if lacks is None and not places.answer_is_in(self.render(places.turns, places.tools, where, prompt=False)):
            lacks = index
        if lacks is not None:
            raise DataError(self._leaves_out(turns[lacks], lacks, where))
        self._kept.add(kind)

    def _leaves_out(self, turn: Turn, number: int, where: str) -> str:
        what, remedy = "text", "write it in another way"
        if turn.tool_calls or turn.role == "tool":
            what, remedy = "text, or the call of a tool," if turn.tool_calls else "text", "remove the line"
        elif turn.role == "system":
            remedy = "write it into the user's turn"
        return (
            f"{where}: messages[{number}]: the chat template leaves out {what} of this {turn.role} turn, so the model "
            f"would never see it; {remedy}, or use a base whose template has a place for it (see {self.file})"
        )


def _between(prompt: str, head: str) -> str:
    """Return the white space that the template writes before an answer, unless the prompt ends with it already."""
    if head.startswith(prompt):
        added = head[len(prompt) :]
        return "" if added.strip() else added
    space = head[len(head.rstrip()) :]
    return "" if prompt.endswith(space) else space


def _as_written(answer: Turn, whole: str, head: str, tail: str, prompt: str) -> str:
    """Return the text of an answer where the template does not write it behind its prompt."""
    if answer.tool_calls and whole.startswith(head):
        return whole[len(head) :]
    content = next((text for text in (answer.content, answer.content.strip()) if text in whole), answer.content)
    if prompt.rstrip().endswith(THOUGHT) and content.lstrip().startswith(THOUGHT):  # the prompt has begun the thoughts
        content = content.lstrip().removeprefix(THOUGHT).removeprefix("\n")
    return content + tail


def _called(turn: Turn) -> list[str]:
    return [str(call["function"]["name"]) for call in turn.tool_calls]


def _contains(rendered: str, written: str) -> bool:
    """Return whether a text was rendered as it was written, trimmed, or as a JSON string."""
    plain = written.strip()
    return any(text in rendered for text in (plain, *(json.dumps(plain, ensure_ascii=a)[1:-1] for a in (False, True))))
