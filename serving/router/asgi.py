"""Types and functions for raw ASGI: read and replay bodies, rewrite headers, answer in JSON, send internal requests.

The router is plain ASGI without a framework, because every answer of SGLang passes through it.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = tuple[tuple[bytes, bytes], ...]

FORWARDED = frozenset({b"content-type", b"accept", b"traceparent", b"tracestate"})
"""Headers of a user's request that SGLang gets: by others a request chooses a worker, a label or what is told of it."""
MESSAGES = "/v1/messages"
"""Anthropic's route; its errors, and those of what is below it there, have a form of their own."""
ANTHROPIC_ERRORS = {
    400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 408: "timeout_error",
    413: "request_too_large", 503: "overloaded_error",
}  # fmt: skip
"""Status → the `type` of Anthropic's errors."""
REQUEST_KEYS = frozenset({"headers", "query_string", "path", "raw_path", "method", "path_params", "extensions"})
"""Keys of a scope that describe one request; all others describe the server and are the same for every request."""
MOST_DIGITS = 20
"""Digits of a content length; uvicorn refuses longer ones."""


async def read_some(receive: Receive, most: float, begun: bytes = b"") -> tuple[bytes, bool]:
    """Read on until the body, which began as `begun`, ends or is over `most` bytes; return it, and if more comes."""
    body, more = bytearray(begun), True
    while more and len(body) <= most:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return bytes(body), more


async def read_body(receive: Receive, most: int) -> bytes | None:
    """Read the whole body; return None as soon as it is over `most` bytes."""
    body, _ = await read_some(receive, most)
    return body if len(body) <= most else None


class Replay:
    """A `receive` that gives a body that was read already, then what the client sends next (a disconnect)."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self.body = body
        self._receive = receive
        self._given = False

    async def __call__(self) -> Message:
        if self._given:
            return await self._receive()
        self._given = True
        return {"type": "http.request", "body": self.body, "more_body": False}


def with_length(scope: Scope, length: int) -> Scope:
    """Return the request with another content length (bytes)."""
    others = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
    return {**scope, "headers": [*others, (b"content-length", str(length).encode())]}


def length(scope: Scope) -> int:
    """Return the content length of a request (bytes); 0 where it says none, as for a body in chunks."""
    said = dict(scope["headers"]).get(b"content-length", b"")
    return int(said) if said.isdigit() and len(said) < MOST_DIGITS else 0


def forwarded(scope: Scope) -> Scope:
    """Return the request with those headers only that SGLang needs, and without a query."""
    return {**scope, "query_string": b"", "headers": [pair for pair in scope["headers"] if pair[0] in FORWARDED]}


def without_keys(scope: Scope) -> Scope:
    """Return the request without the user's key, which nothing behind the router may see."""
    kept = [(name, value) for name, value in scope["headers"] if name not in (b"authorization", b"x-api-key")]
    return {**scope, "headers": kept}


def with_key(scope: Scope, key: str) -> Scope:
    """Return the request with the engine's own key in place of the user's."""
    others = without_keys(scope)["headers"]
    return {**scope, "headers": [*others, (b"authorization", b"Bearer " + key.encode())]}


async def reply(send: Send, status: int, body: object, headers: Headers = ()) -> None:
    """Answer with JSON."""
    content = json.dumps(body).encode()
    common = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*common, *headers]})
    await send({"type": "http.response.body", "body": content})


async def error(
    send: Send,
    status: int,
    message: str,
    kind: str,
    param: str | None = None,
    code: str | None = None,
    *,
    path: str = "",
    headers: Headers = (),
) -> None:
    """Answer with an error in the form that OpenAI's clients expect, or Anthropic's if the request's `path` is its."""
    body: dict[str, Any] = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    if path == MESSAGES or path.startswith(f"{MESSAGES}/"):
        body = {"type": "error", "error": {"type": ANTHROPIC_ERRORS.get(status, "api_error"), "message": message}}
    await reply(send, status, body, headers)


async def not_ready(send: Send, path: str = "") -> None:
    """Answer 503 and ask the client to try again."""
    message = "The site is starting or stopping; try again."
    again = ((b"retry-after", b"2"),)
    await error(send, 503, message, "server_error", code="not_ready", path=path, headers=again)


async def post(app: ASGIApp, scope: Scope, path: str, body: dict[str, Any], key: str) -> tuple[int, bytes]:
    """Send a request of the router's own to `app`; return status and body.

    `scope` is taken from any request to `app`: it says what the server is, and the rest is replaced.
    """
    content, status, answer = json.dumps(body).encode(), 500, bytearray()
    servers = {name: value for name, value in scope.items() if name not in REQUEST_KEYS}
    headers = [(b"content-type", b"application/json")]
    asked: Scope = {
        **servers, "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"", "headers": headers,
    }  # fmt: skip

    async def nobody_leaves() -> Message:
        await asyncio.Event().wait()
        raise AssertionError("never reached")

    async def collect(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)
        answer.extend(message.get("body", b""))

    await app(with_length(with_key(asked, key), len(content)), Replay(content, nobody_leaves), collect)
    return status, bytes(answer)
