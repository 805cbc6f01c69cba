"""`Traffic`: counts errors, latencies and ratings of each version's answers as they pass; no contents, no names.

They are counted by user, too, under codes that mean nothing outside this process (see `serving.router.user_counts`).

Errors are the site's own: a status of 500 or above, an exception, a stream that breaks off or says that it failed. A
client's mistake (4xx), or an answer that its client did not wait for, is no evidence against a version and not counted.
"""

import asyncio
import json
import math
import re
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from serving.router.api_keys import ALL, Access
from serving.router.asgi import Message, Receive, Send
from serving.router.feedback import Rating, Ratings
from serving.router.user_counts import UserCodes, UserCount, UserCounts
from serving.traffic_report import VersionTraffic

SHORTEST_S = 1e-6
"""Shorter times are counted as this one: they have a logarithm."""
ID_WITHIN_BYTES = 4096
"""An answer's id is looked for in so many of its first bytes."""
_ID = re.compile(rb'"id"\s*:\s*"([^"\\]{1,256})"')
_FAILED = re.compile(rb'data: \{"error"')


class Answer:
    """Follows one answer on its way to a user; a context manager around the call that produces it."""

    def __init__(self, tally: "_Tally", traffic: "Traffic", adapter: str | None, user: int | None) -> None:
        self._tally, self._traffic, self._adapter, self._user = tally, traffic, adapter, user
        self._clock = traffic.clock
        self._began = self._clock()
        self._first = self._last = 0.0
        self._chunks = 0
        self._streamed = self._failed = self._left = self._ended = self._heard = False
        self._status = 0
        self.kept: list[bytes] | None = None
        """The bytes sent so far, if `keep` was called and they are not too many."""
        self._room = 0

    @property
    def whole(self) -> bool:
        """True if the answer ended without an error."""
        return self._ended and self._status == 200 and not self._failed

    @property
    def streamed(self) -> bool:
        """True if the answer is a stream of events."""
        return self._streamed

    def keep(self, most: int) -> None:
        """Keep what is sent, up to `most` bytes."""
        self.kept, self._room = [], most

    def receive(self, receive: Receive) -> Receive:
        """Wrap `receive`, so that a client that disconnects is noticed."""

        async def watched() -> Message:
            message = await receive()
            self._left = self._left or message["type"] == "http.disconnect"
            return message

        return watched

    def send(self, send: Send) -> Send:
        """Wrap `send`, so that status, times and failures are noticed."""

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._status = message["status"]
                self._streamed = (
                    dict(message.get("headers", [])).get(b"content-type", b"").startswith(b"text/event-stream")
                )
            else:
                self._body(message.get("body", b""), message.get("more_body", False))
            await send(message)

        return watched

    def _body(self, body: bytes, more: bool) -> None:
        self._ended = not more
        if not body:
            return
        self._last = self._clock()
        self._chunks += 1
        self._failed = self._failed or (self._streamed and _is_failure(body))
        if self._chunks == 1:
            self._first = self._last
            self._be_heard()
            found = _ID.search(body, 0, ID_WITHIN_BYTES)
            if found and self._status == 200:
                answer, label = found[1].decode(errors="replace"), self._tally.label
                self._traffic.ratings.remember(answer, label, self._adapter, self._user)
        if self.kept is not None:
            self.kept.append(body)
            self._room -= len(body)
            if self._room < 0:
                self.kept = None

    def _be_heard(self) -> None:
        if not self._heard:
            self._heard = True
            self._traffic.waiting -= 1

    def __enter__(self) -> Self:
        self._traffic.waiting += 1
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._be_heard()
        left = self._left or (kind is not None and issubclass(kind, asyncio.CancelledError))
        broken = kind is not None or not self._ended or self._failed or self._status >= 500
        if (broken and left) or (400 <= self._status < 500):
            return
        user = self._tally.user(self._user)
        for count in (self._tally, user):
            count.requests += 1
            count.errors += broken
        if self._streamed and not broken:
            self._tally.chunks += self._chunks
            self._tally.streams += 1
            user.streams += 1
            user.log_ttft += math.log(max(SHORTEST_S, self._first - self._began))
            if self._chunks > 1:
                user.paced += 1
                user.log_tpot += math.log(max(SHORTEST_S, (self._last - self._first) / (self._chunks - 1)))


class Traffic:
    """Counts the answers of every version since the engine started."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.ratings = Ratings()
        self.waiting = 0
        """Number of users who have been sent nothing yet."""
        self._codes = UserCodes()
        self._tallies: dict[str, _Tally] = {}

    def answer(self, label: str, adapter: str | None = None, user: str | None = None) -> Answer:
        """Return a context manager that follows one answer of version `label`, for which `adapter` was asked.

        `user` is the id of the user, if the adapter was asked for by its plain name; None: the answer is no one's.
        """
        code = None if user is None else self._codes.of(adapter or "", user)
        return Answer(self._tally(label), self, adapter, code)

    def rate(self, answer: str, rating: Rating, access: Access = ALL) -> str:
        """Count a user's rating of an answer in place of the one before; return the version that gave the answer.

        Raises NotFound for an answer that is unknown or forgotten, or whose adapter the user does not see.
        """
        label, user, before = self.ratings.rate(answer, rating, access)
        tally = self._tally(label)
        for count in (tally, tally.user(user)):
            count.up += (rating == "up") - (before == "up")
            count.down += (rating == "down") - (before == "down")
        return label

    def forget_all_but(self, labels: set[str]) -> None:
        """Drop the counts of all versions but these."""
        self._tallies = {label: tally for label, tally in self._tallies.items() if label in labels}

    def report(self) -> dict[str, VersionTraffic]:
        """Return the counts of each version."""
        return {label: tally.report() for label, tally in self._tallies.items()}

    def _tally(self, label: str) -> "_Tally":
        return self._tallies.setdefault(label, _Tally(label))


class _Tally:
    """The counts of one version."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.requests = self.errors = self.chunks = self.streams = self.up = self.down = 0
        self._users = UserCounts()

    def user(self, code: int | None) -> UserCount:
        """Return the counts of a user; of one who is not kept, counts that go nowhere."""
        return (None if code is None else self._users.of(code)) or UserCount()

    def report(self) -> VersionTraffic:
        return VersionTraffic(
            requests=self.requests,
            errors=self.errors,
            chunks=self.chunks,
            up=self.up,
            down=self.down,
            streams=self.streams,
            users=self._users.distinct,
            by_user=self._users.report(),
        )


def _is_failure(event: bytes) -> bool:
    """Return whether an event of a stream reports a failure of the server, not a client's mistake (a code of 4xx)."""
    if not _FAILED.match(event):
        return False
    try:
        code = json.loads(event.removeprefix(b"data: "))["error"].get("code")
    except (ValueError, AttributeError):  # not the form that SGLang writes, so it counts as a failure
        return True
    return not (isinstance(code, int) and 400 <= code < 500)
