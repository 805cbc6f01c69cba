"""`StandIns`: a conversation with a text of its own in each place, to see what of it a chat template writes.

A template that leaves a place out cannot be told by the text there, which may stand elsewhere in the prompt by chance.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from client.data.conversation import Turn

Tools = tuple[dict[str, Any], ...]


def content(number: int) -> str:
    """Return the text that stands for the content of a turn. No template changes it."""
    return f"umbel{number:03d}umbel"


@dataclass(frozen=True)
class StandIns:
    """Stand-ins for the turns up to an answer, the answer included, and for the tools."""

    turns: list[Turn]
    tools: Tools

    @classmethod
    def of(cls, turns: Sequence[Turn], tools: Tools) -> "StandIns":
        """Return turns and tools of the same make, with another text in each place that has one."""
        named = [
            {**tool, "function": {**tool["function"], "name": f"umbeltool{k:02d}"}} for k, tool in enumerate(tools)
        ]
        return cls([_turn(turn, number) for number, turn in enumerate(turns)], tuple(named))

    @staticmethod
    def kind(turns: Sequence[Turn], tools: Tools) -> tuple[object, ...]:
        """Return what decides the places: two conversations of one kind have the same."""
        made = [(turn.role, bool(turn.content), len(turn.tool_calls), bool(turn.reasoning_content)) for turn in turns]
        return (*made, len(tools))

    def prompt_lacks(self, shown: str) -> int | None:
        """Return the first turn before the answer of which a prompt leaves something out; None if all is there."""
        for number, turn in enumerate(self.turns[:-1]):
            if not all(text in shown for text in _texts(turn, thoughts=False)):
                return number
        return None

    def answer_is_in(self, shown: str) -> bool:
        """Return whether all of the answer is in a text."""
        return all(text in shown for text in _texts(self.turns[-1], thoughts=True))

    def tools_are_in(self, shown: str) -> bool:
        """Return whether the names of all tools are in a text."""
        return all(tool["function"]["name"] in shown for tool in self.tools)


def _turn(turn: Turn, number: int) -> Turn:
    this = f"umbel{number:03d}"
    calls = [
        {**call, "function": {"name": f"{this}call{k:02d}", "arguments": {"umbel": f"{this}with{k:02d}"}}}
        for k, call in enumerate(turn.tool_calls)
    ]
    return replace(
        turn,
        content=content(number) if turn.content else "",
        tool_calls=tuple(calls),
        reasoning_content=f"{this}thought" if turn.reasoning_content else None,
    )


def _texts(turn: Turn, *, thoughts: bool) -> Iterator[str]:
    yield turn.content
    if thoughts:  # those of earlier answers are left out by design
        yield turn.reasoning_content or ""
    for call in turn.tool_calls:
        yield call["function"]["name"]
        yield call["function"]["arguments"]["umbel"]
