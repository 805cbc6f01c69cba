"""`Prefixes`: counts the beginnings (system messages and tools) that requests of an adapter share, in memory only.

Each version has a KV cache of its own, and a new version's is empty. Before a version answers users, it computes the
most used beginnings, so that the first users after a promotion do not wait for that.
"""

import json
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any

MAX_BEGINNINGS = 256
"""Number of latest beginnings that are counted for each adapter."""
MAX_BYTES = 256 << 10
"""Longer beginnings are not counted."""
ROOM_BYTES = 16 << 20
"""Bytes of all beginnings of all adapters; where it is full, the adapter that has the most forgets its oldest one."""
INSTRUCTIONS = ("system", "developer")
"""Roles of messages that stand before the conversation."""
RENDERED = ("tools", "chat_template_kwargs")
"""Fields that chat templates write before the conversation, besides its first messages."""
AFTER = {"role": "user", "content": "."}
"""Stands for the user's first message, which templates require; the shared beginning ends before it."""


class Prefixes:
    """Counts beginnings of conversations, separately for each adapter."""

    def __init__(self, most: int = MAX_BEGINNINGS, room: int = ROOM_BYTES) -> None:
        self._most, self._room = most, room
        self._counts: dict[str, OrderedDict[str, int]] = {}
        self._bytes: Counter[str] = Counter()

    def count(self, adapter: str, request: Mapping[str, Any]) -> None:
        """Count the beginning of a chat; a request that is no chat, or has no shared beginning, is not counted."""
        beginning = beginning_of(request)
        if beginning is None:
            return
        counts = self._counts.setdefault(adapter, OrderedDict())
        if beginning not in counts:
            self._bytes[adapter] += len(beginning)
        counts[beginning] = counts.get(beginning, 0) + 1
        counts.move_to_end(beginning)
        while len(counts) > self._most:
            self._forget_oldest(adapter)
        while self._bytes.total() > self._room:
            self._forget_oldest(max(self._bytes, key=lambda one: self._bytes[one]))

    def top(self, adapter: str, most: int) -> list[dict[str, Any]]:
        """Return the most used beginnings that more than one request had, as bodies of chats of one token."""
        shared = [(count, text) for text, count in self._counts.get(adapter, {}).items() if count > 1]
        shared.sort(key=lambda each: -each[0])
        found = [json.loads(text) for _, text in shared[:most]]
        return [{**body, "messages": [*body["messages"], AFTER], "max_tokens": 1} for body in found]

    def _forget_oldest(self, adapter: str) -> None:
        beginning, _ = self._counts[adapter].popitem(last=False)
        self._bytes[adapter] -= len(beginning)


def beginning_of(request: Mapping[str, Any]) -> str | None:
    """Return the beginning that a chat may share with others, as JSON; None if there is none or it is too long."""
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
