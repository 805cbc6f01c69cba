"""`Conversation`: one example for training, as turns of a chat and the tools that its answers may call."""

import hashlib
import json
import unicodedata
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Turn:
    """One message of a conversation."""

    role: str
    """system, user, assistant or tool."""
    content: str
    """Its text; empty where an answer only calls tools."""
    tool_calls: tuple[dict[str, Any], ...] = ()
    """Calls of an answer, each `{"id", "index", "type", "function": {"name", "arguments"}}`, arguments as an object."""
    tool_call_id: str | None = None
    """The call that a tool's turn answers."""
    name: str | None = None
    """Name of the tool, in a tool's turn."""
    reasoning_content: str | None = None
    """Thoughts before an answer, for templates that write them."""
    trained: bool = True
    """False for an answer without a loss; other turns never carry one."""

    def message(self) -> dict[str, Any]:
        """Return the turn as SGLang hands it to the chat template: keys without a value left out."""
        known = {
            "role": self.role,
            "content": self.content,
            "tool_calls": list(self.tool_calls) or None,
            "tool_call_id": self.tool_call_id,
            "name": self.name,
            "reasoning_content": self.reasoning_content,
        }
        return {key: value for key, value in known.items() if value is not None}


@dataclass(frozen=True)
class Conversation:
    """The turns of an example, ending with an answer.

    >>> Conversation((Turn("user", "1 + 1 ="), Turn("assistant", "2")))
    """

    turns: tuple[Turn, ...]
    tools: tuple[dict[str, Any], ...] = ()
    """Tools that the prompt offers, each `{"type": "function", "function": {...}, "defer_loading": None}`."""
    group: str | None = None
    """Name that whoever wrote the data gave to what the example is about; it is no part of any text."""
    domain: str | None = None
    """Name of the part of the data that it belongs to, which is trained or left out as a whole; no part of any text."""

    @property
    def answers(self) -> list[int]:
        """Indices of the assistant's turns."""
        return [index for index, turn in enumerate(self.turns) if turn.role == "assistant"]


def content_of(conversation: Conversation) -> str:
    """Return the sha256 of every text in a conversation, as hexadecimal digits: the same for repeated examples."""
    parts: list[Any] = []
    for turn in conversation.turns:
        more = {key: value for key, value in turn.message().items() if key not in ("role", "content")}
        more |= {} if turn.trained else {"weight": 0}
        parts.append([turn.role, turn.content, *([more] if more else [])])
    parts += [{"tools": conversation.tools}] if conversation.tools else []
    return _digest(parts)


def group_of(conversation: Conversation) -> str:
    """Return the sha256 of what a conversation is about, as hexadecimal digits: the same for examples that belong
    together, which are on one side of the split and count once in a verdict.

    It is about its `group` or, without one, about its first user turn, whatever that one's case, white space and
    Unicode form: one question with several answers, with and without a system turn, or a conversation that was exported
    again with a turn more. Where no user says anything, it is about all that comes before the first answer.
    """
    if conversation.group is not None:
        return _digest(["group", conversation.group])
    first = next((turn.content for turn in conversation.turns if turn.role == "user"), None)
    if first is not None:
        return _digest(["user", _plain(first)])
    return _digest(["prompt", *(_plain(turn.content) for turn in conversation.turns[: conversation.answers[0]])])


def _plain(text: str) -> str:
    """Return a text as what differs only in case, white space or Unicode form is written alike."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.split())


def _digest(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
