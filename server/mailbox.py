"""Flower messages in flight: pushed in lists, matched to their replies, given up when no reply can come any more."""

import time
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

TTL_S = 120.0
"""Flower never redelivers a message that a restarted SuperNode had taken; it is sent again after this long."""
_SLACK_S = 5.0
"""The SuperLink reports an expired message itself; only then do we stop waiting for it to."""
_LOST = frozenset({3, 4, 5, 8})
"""Flower's codes for: message unavailable, reply unavailable, node unavailable, ClientApp crashed."""


@dataclass(frozen=True)
class Letter:
    """One message to one node; `key` is how its sender knows the answer again."""

    key: Hashable
    node_id: int
    message_type: str
    content: RecordDict
    fetches: bool = False
    """Whether the answer brings an adapter; such answers are pulled one at a time."""


@dataclass(frozen=True)
class Lost:
    """No answer will come, but the same message may be sent again."""

    reason: str


@dataclass(frozen=True)
class Broken:
    """The ClientApp itself failed; sending again will not help."""

    reason: str


Answer = RecordDict | Lost | Broken


@dataclass(frozen=True)
class _InFlight:
    key: Hashable
    node_id: int
    expires: float
    fetches: bool


class Mailbox:
    """Sends letters over a Grid, and hands out each one's answer once."""

    def __init__(self, grid: Grid, *, ttl: float = TTL_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._grid = grid
        self._ttl = ttl
        self._clock = clock
        self._in_flight: dict[str, _InFlight] = {}

    def send(self, letters: Sequence[Letter], group: str) -> None:
        """Push letters; `group` is Flower's group id, the round."""
        if not letters:
            return
        messages = [
            Message(letter.content, letter.node_id, letter.message_type, ttl=self._ttl, group_id=group)
            for letter in letters
        ]
        expires = self._clock() + self._ttl + _SLACK_S
        for message_id, letter in zip(self._grid.push_messages(messages), letters, strict=True):
            # A message that Flower did not take has no id; as one that expires at once it is reported as lost.
            taken = _InFlight(letter.key, letter.node_id, expires if message_id else 0.0, letter.fetches)
            self._in_flight[message_id or f"refused-{id(letter)}"] = taken

    def receive(self, online: Collection[int]) -> Iterator[tuple[Hashable, Answer]]:
        """What arrived since the last call. A message to a node that is not `online` any more is lost.

        An adapter is pulled when the caller asks for the next answer: one is in memory at a time, however many wait.
        """
        small = [message_id for message_id, sent in self._in_flight.items() if not sent.fetches]
        large = [message_id for message_id, sent in self._in_flight.items() if sent.fetches]
        yield from self._pull(small)
        for message_id in large:
            yield from self._pull([message_id])
        for message_id, sent in list(self._in_flight.items()):
            gone = sent.node_id not in online
            if gone or self._clock() >= sent.expires:
                self._in_flight.pop(message_id, None)
                yield sent.key, Lost("its SuperNode went away" if gone else "the message was lost")

    def forget(self, key: Hashable) -> None:
        """Stop waiting for the answers to `key`."""
        self._in_flight = {message: sent for message, sent in self._in_flight.items() if sent.key != key}

    def _pull(self, message_ids: list[str]) -> Iterator[tuple[Hashable, Answer]]:
        """Answers to some letters. Those to letters that were forgotten meanwhile are dropped."""
        asked = [message_id for message_id in message_ids if message_id in self._in_flight]
        for message in self._grid.pull_messages(asked) if asked else ():
            # Errors that the SuperLink makes carry its own node id: the message replied to is what identifies them.
            sent = self._in_flight.pop(message.metadata.reply_to_message_id, None)
            if sent is not None:
                yield sent.key, _answer(message)


def _answer(message: Message) -> Answer:
    if message.has_content():
        return message.content
    code, reason = message.error.code, message.error.reason or "no reason given"
    return Lost(f"Flower error {code}: {reason}") if code in _LOST else Broken(f"Flower error {code}: {reason}")
