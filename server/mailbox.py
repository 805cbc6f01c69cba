"""`Mailbox`: Flower messages in flight, matched to their replies, and given up when no reply can come any more.

Flower's own pull waits for a reply that its sender has announced and not yet sent. A SuperNode that died while it sent
leaves such a reply behind, and the pull then waits for three minutes, until the SuperLink forgets the reply
(`OBJECT_PUSH_SESSION_TTL_SECONDS`, flwr 1.41). So each pull has a thread of its own. When a pull for small answers
takes too long, its messages count as lost and are sent again; a slow adapter comes in while everything else goes on.
"""

import threading
import time
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from umbel.printable import LONGEST_REASON, one_line

TTL_S = 120.0
"""Seconds after which a message is sent again: Flower never redelivers one that a restarted SuperNode had taken."""
_SLACK_S = 5.0
"""Seconds that the SuperLink has to report an expired message itself, before it counts as lost."""
PATIENCE_S = 20.0
"""Seconds that everything else waits for one pull."""
_BATCH = 32
"""Messages per pull; if one reply never completes, only the messages of this pull are sent again."""
_LOST = frozenset({3, 4, 5, 8})
"""Flower's codes for: message unavailable, reply unavailable, node unavailable, ClientApp crashed."""


@dataclass(frozen=True)
class Letter:
    """One message to one node; its answer is handed out with the same `key`."""

    key: Hashable
    node_id: int
    message_type: str
    content: RecordDict
    fetches: bool = False
    """True when the answer brings an adapter; such answers are pulled one at a time."""


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

    def __init__(
        self,
        grid: Grid,
        *,
        ttl: float = TTL_S,
        patience: float = PATIENCE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._grid = grid
        self._ttl = ttl
        self._patience = patience
        self._clock = clock
        self._in_flight: dict[str, _InFlight] = {}
        self._fetch: _Pull | None = None
        """The pull of the adapter that is coming in; None while none is."""

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
        """Yield (key, answer) for the answers since the last call. A message to a node that went offline is lost.

        An adapter is pulled when the caller asks for the next answer, so that one is in memory at a time.
        """
        small = [message_id for message_id, sent in self._in_flight.items() if not sent.fetches]
        large = [message_id for message_id, sent in self._in_flight.items() if sent.fetches]
        for first in range(0, len(small), _BATCH):
            yield from self._pull(small[first : first + _BATCH])
        yield from self._fetched(large)
        for message_id, sent in list(self._in_flight.items()):
            gone, comes = sent.node_id not in online, self._fetch is not None and message_id in self._fetch.message_ids
            if gone or (self._clock() >= sent.expires and not comes):
                self._in_flight.pop(message_id, None)
                yield sent.key, Lost("its SuperNode went away" if gone else "the message was lost")

    def forget(self, key: Hashable) -> None:
        """Stop waiting for the answers to `key`."""
        self._in_flight = {message: sent for message, sent in self._in_flight.items() if sent.key != key}

    def _pull(self, message_ids: list[str]) -> Iterator[tuple[Hashable, Answer]]:
        """Pull small answers."""
        asked = [message_id for message_id in message_ids if message_id in self._in_flight]
        if not asked:
            return
        pull = _Pull(self._grid, asked)
        pull.join(self._patience)
        if not pull.is_alive():
            yield from self._answers(pull)
            return
        for message_id in asked:
            sent = self._in_flight.pop(message_id, None)
            if sent is not None:
                yield sent.key, Lost("an answer was announced, and did not arrive whole")

    def _fetched(self, message_ids: list[str]) -> Iterator[tuple[Hashable, Answer]]:
        """Pull adapters, one at a time."""
        for message_id in message_ids:
            patience = 0.0
            if self._fetch is None:
                if message_id not in self._in_flight:
                    continue
                self._fetch, patience = _Pull(self._grid, [message_id]), self._patience
            self._fetch.join(patience)
            if self._fetch.is_alive():
                return
            fetch, self._fetch = self._fetch, None
            yield from self._answers(fetch)

    def _answers(self, pull: "_Pull") -> Iterator[tuple[Hashable, Answer]]:
        """Yield the answers of a pull. Answers to letters that were forgotten meanwhile are dropped."""
        for message in pull.taken():
            # Errors that the SuperLink makes carry its own node id: the message replied to is what identifies them.
            sent = self._in_flight.pop(message.metadata.reply_to_message_id, None)
            if sent is not None:
                yield sent.key, _answer(message)


class _Pull(threading.Thread):
    """One look for answers, in a daemon thread: the ServerApp can end while it still waits."""

    def __init__(self, grid: Grid, message_ids: list[str]) -> None:
        super().__init__(name="pull", daemon=True)
        self.message_ids = message_ids
        self._grid = grid
        self._messages: list[Message] = []
        self._error: list[BaseException] = []
        self.start()

    def run(self) -> None:
        try:
            self._messages = list(self._grid.pull_messages(self.message_ids))
        except BaseException as error:  # `taken` raises it in the caller's thread
            self._error.append(error)

    def taken(self) -> Iterator[Message]:
        """Yield the messages and keep none of them; raise the error of the pull if it failed."""
        for error in self._error:
            raise error
        while self._messages:
            yield self._messages.pop(0)


def _answer(message: Message) -> Answer:
    if message.has_content():
        return message.content
    code, reason = message.error.code, one_line(message.error.reason or "no reason given", LONGEST_REASON)
    return Lost(f"Flower error {code}: {reason}") if code in _LOST else Broken(f"Flower error {code}: {reason}")
