"""`RefuseSuspects`: note each request to a model while it is answered, and refuse those that ended an engine before."""

import math
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from serving import engine_state
from serving.engine_state import EngineState
from serving.router import asgi
from serving.router.asgi import ASGIApp, Message, Receive, Scope, Send
from serving.router.fields.routes import ROUTES
from serving.suspects import REFUSED_S, Refusals

CODE = "ended_the_engine"


class RefuseSuspects:
    """ASGI middleware between the router and SGLang: it sees the bodies that SGLang gets.

    It keeps digests only. A request counts as answered if all of a 200 was sent before its client left: then it is not
    what ends an engine that dies while the same request is in flight again. One that its client left may hang the
    engine all the same, and is in flight until the engine has got past it.
    """

    def __init__(
        self, app: ASGIApp, state: EngineState, refusals: Refusals, clock: Callable[[], float] = time.time
    ) -> None:
        self._app = app
        self._state = state
        self._refusals = refusals
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in ROUTES:
            return await self._app(scope, receive, send)
        body, _ = await asgi.read_some(receive, math.inf)  # the router's own bytes, which it has bounded
        digest = self._refusals.digest(scope["path"], body)
        until = self._refusals.until.get(digest.hex(), 0.0)
        if 0 < until - self._clock() <= REFUSED_S:  # else the clock was set back
            return await asgi.error(send, 400, _reason(until), "invalid_request_error", code=CODE, path=scope["path"])
        ending = _Ending(asgi.Replay(body, receive), send)
        slot = self._state.begin(digest)
        try:
            await self._app(scope, ending.receive, ending.send)
        finally:
            self._state.end(slot, answered=ending.whole, left=ending.left)
        return None


class _Ending:
    """Follows one answer, to know whether it came to its end."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self._status = 0
        self._gone = self._ended = False

    @property
    def whole(self) -> bool:
        return self._status == 200 and self._ended

    @property
    def left(self) -> bool:
        return self._gone and not self._ended

    async def receive(self) -> Message:
        message = await self._receive()
        self._gone = self._gone or message["type"] == "http.disconnect"
        return message

    async def send(self, message: Message) -> None:
        self._status = message.get("status", self._status)
        last = message["type"] == "http.response.body" and not message.get("more_body", False)
        self._ended = self._ended or (last and not self._gone)
        await self._send(message)


def refuse_suspects(app: ASGIApp, run_dir: Path) -> ASGIApp:
    """Wrap `app` in a `RefuseSuspects` if a daemon runs this engine; else return `app` itself."""
    state, refusals = engine_state.opened(run_dir), Refusals.read(run_dir)
    return RefuseSuspects(app, state, refusals) if state is not None and refusals is not None else app


def _reason(until: float) -> str:
    at = datetime.fromtimestamp(until, UTC).strftime("%H:%M:%S UTC")
    return (
        "The engine ended when it was asked exactly this before, so this request is not answered again until "
        f"{at}. Change the request; others are answered."
    )
