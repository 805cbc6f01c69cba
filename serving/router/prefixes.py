"""How many conversations begin: the system messages and tools that most requests of an adapter share.

Before another version answers, it is given the most used ones, so that the first user after a promotion finds them in
the KV cache: it belongs to one version, and a new one has none. Kept in memory only.
"""

import json
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

REMEMBERED = 256
"""Beginnings that are counted for an adapter: the latest ones."""
MAX_BYTES = 256 << 10
"""A beginning that is longer is not kept."""
INSTRUCTIONS = ("system", "developer")
RENDERED = ("tools", "chat_template_kwargs")
"""What chat templates write before the conversation, besides its first messages."""
AFTER = {"role": "user", "content": "."}
"""Templates want a user's turn; what is shared ends before it."""


class Prefixes:
    """Counts beginnings of conversations, for each adapter by itself."""

    def __init__(self, most: int = REMEMBERED) -> None:
        self._most = most
        self._counts: dict[str, OrderedDict[str, int]] = {}

    def count(self, adapter: str, request: Mapping[str, Any]) -> None:
        """Note how a chat begins; what is no chat, or begins with nothing that others share, is not counted."""
        beginning = beginning_of(request)
        if beginning is None:
            return
        counts = self._counts.setdefault(adapter, OrderedDict())
        counts[beginning] = counts.get(beginning, 0) + 1
        counts.move_to_end(beginning)
        while len(counts) > self._most:
            counts.popitem(last=False)

    def top(self, adapter: str, most: int) -> list[dict[str, Any]]:
        """The most used beginnings that more than one request had, as bodies of chats of one token."""
        shared = [(count, text) for text, count in self._counts.get(adapter, {}).items() if count > 1]
        shared.sort(key=lambda each: -each[0])
        found = [json.loads(text) for _, text in shared[:most]]
        return [{**body, "messages": [*body["messages"], AFTER], "max_tokens": 1} for body in found]


def beginning_of(request: Mapping[str, Any]) -> str | None:
    """What a chat may share with others, as JSON; None where there is nothing, or it is too long."""
    messages = request.get("messages")
    if not isinstance(messages, list):
        return None
    first: list[Any] = []
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in INSTRUCTIONS:
            break
        first.append(message)
    rendered = {field: request[field] for field in RENDERED if request.get(field)}
    if not first and "tools" not in rendered:
        return None
    text = json.dumps({"messages": first, **rendered})  # keys as they came: templates write tools in that order
    return text if len(text) <= MAX_BYTES else None
