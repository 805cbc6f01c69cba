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

MAX_BODY_BYTES = 64 << 20
"""Limit on the body of a user's request; longer ones are answered with 413."""
REQUEST_KEYS = frozenset({"headers", "query_string", "path", "raw_path", "method", "path_params", "extensions"})
"""Keys of a scope that describe one request; all others describe the server and are the same for every request."""


async def read_body(receive: Receive, most: int) -> bytes | None:
    """Read the whole body; return None as soon as it is over `most` bytes."""
    body, more = bytearray(), True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > most:
            return None
    return bytes(body)


def replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives a body that was read already, then what the client sends next (a disconnect)."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return pending.pop() if pending else await receive()

    return replayed


def with_length(scope: Scope, length: int) -> Scope:
    """Return the request with another content length (bytes)."""
    others = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
    return {**scope, "headers": [*others, (b"content-length", str(length).encode())]}


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
    send: Send, status: int, message: str, kind: str, param: str | None = None, code: str | None = None
) -> None:
    """Answer with an error in the form that OpenAI's clients expect."""
    await reply(send, status, {"error": {"message": message, "type": kind, "param": param, "code": code}})


async def not_ready(send: Send) -> None:
    """Answer 503 and ask the client to try again."""
    body = {
        "error": {
            "message": "The site is starting or stopping; try again.",
            "type": "server_error",
            "param": None,
            "code": "not_ready",
        }
    }
    await reply(send, 503, body, ((b"retry-after", b"2"),))


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

    await app(with_length(with_key(asked, key), len(content)), replay(content, nobody_leaves), collect)
    return status, bytes(answer)
