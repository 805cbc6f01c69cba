"""`Bodies`: reads the bodies of users' requests, and bounds what long ones hold of this process's memory.

A body is parsed here and once more by SGLang, whose objects live until the answer has ended: at worst, for a body of
nothing but `{}`, some 25 bytes each time for one of the body. So a long body is counted from before it is read until
its answer has ended, and waits for its turn, first come, first served, while those before it fill the room. Nothing is
read from its connection meanwhile, which holds its sender back. Who sends too slowly loses the turn.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator

from serving.router import asgi
from serving.router.asgi import Receive, Scope, Send
from umbel.errors import UmbelError

MAX_BODY_BYTES = 8 << 20
"""Limit on a body: a prompt of a million tokens as text or as token ids is shorter."""
LONG_BYTES = 64 << 10
"""Bodies up to this length take no turns."""
ROOM_BYTES = 64 << 20
"""Bytes of all long bodies whose requests are read or answered at a time."""
TURN_S = 60.0
"""Seconds that a long body waits for room, before its client is asked to come again."""
SENT_S = 30.0
"""Seconds in which a long body has to come once it has room: 8 MiB at 2.2 Mbit/s. Shorter than `TURN_S`."""
BUSY = 503


class BodyRefused(UmbelError, ValueError):
    """A body that is not read to its end; `status` is the HTTP status of the answer, `code` its code for programs."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


async def refuse(send: Send, refused: BodyRefused, path: str) -> None:
    """Answer a request to the route `path` whose body is not read."""
    again = ((b"retry-after", b"10"),) if refused.status == BUSY else ()
    kind = "server_error" if refused.status == BUSY else "invalid_request_error"
    await asgi.error(send, refused.status, str(refused), kind, code=refused.code, path=path, headers=again)


def _too_long() -> BodyRefused:
    return BodyRefused(413, f"The body is over {MAX_BODY_BYTES >> 20} MiB; send a shorter one.")


class Bodies:
    """The room for long bodies of one process."""

    def __init__(self, room: int = ROOM_BYTES, turn_s: float = TURN_S, sent_s: float = SENT_S) -> None:
        self.free = room
        """Bytes that are not counted for any request."""
        self._turn_s, self._sent_s = turn_s, sent_s
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @contextlib.asynccontextmanager
    async def read(self, scope: Scope, receive: Receive) -> AsyncIterator[bytes]:
        """Give a request's whole body, and count it until the context ends; one that was read already is not counted.

        Raises BodyRefused for one that is over MAX_BODY_BYTES (413), comes too slowly (408) or gets no room (503).
        """
        if isinstance(receive, asgi.Replay):
            yield receive.body
            return
        length = asgi.length(scope)
        if length > MAX_BODY_BYTES:
            raise _too_long()
        begun, more = await asgi.read_some(receive, LONG_BYTES)
        if len(begun) <= LONG_BYTES:
            yield begun
            return
        counted = max(length or MAX_BODY_BYTES, len(begun))
        await self._take(counted)
        try:
            body = await self._rest(begun, receive, more)
            del begun
            self._give(counted - len(body))
            counted = len(body)
            yield body
        finally:
            self._give(counted)

    async def _rest(self, body: bytes, receive: Receive, more: bool) -> bytes:
        """Read on, if more comes than `body`."""
        if more:
            try:
                async with asyncio.timeout(self._sent_s):
                    body, _ = await asgi.read_some(receive, MAX_BODY_BYTES, body)
            except TimeoutError as error:
                message = f"The body did not come within {self._sent_s:g} s; send a shorter one, or on a faster way."
                raise BodyRefused(408, message) from error
        if len(body) > MAX_BODY_BYTES:
            raise _too_long()
        return body

    async def _take(self, bytes_: int) -> None:
        """Wait for room; those who came before get theirs before."""
        if not self._waiting and bytes_ <= self.free:
            self.free -= bytes_
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((bytes_, turn))
        taken = False
        try:
            async with asyncio.timeout(self._turn_s):
                await turn
            taken = True
        except TimeoutError as error:
            raise BodyRefused(BUSY, "The site answers many long requests now; try again.", "busy") from error
        finally:
            if not taken:  # the turn may have come in the moment in which the waiting ended
                self._give(0 if turn.cancelled() else bytes_)

    def _give(self, bytes_: int) -> None:
        self.free += bytes_
        self._let_in()

    def _let_in(self) -> None:
        while self._waiting:
            bytes_, turn = self._waiting[0]
            if not turn.cancelled():
                if bytes_ > self.free:
                    return
                self.free -= bytes_
                turn.set_result(None)
            self._waiting.popleft()
