"""ASGI by hand, as far as the router needs it: bodies read and given once more, JSON answers, requests of its own."""

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

OF_ONE_REQUEST = frozenset({"headers", "query_string", "path", "raw_path", "method", "path_params", "extensions"})
"""What a scope says of its own request; all else is the server's, and the same for every one."""


async def read_body(receive: Receive, most: int) -> bytes | None:
    """The whole body, or None when it is over `most` bytes."""
    body, more = bytearray(), True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > most:
            return None
    return bytes(body)


def replay(body: bytes, receive: Receive) -> Receive:
    """Give the body that was read once more, then whatever comes (a disconnect)."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return pending.pop() if pending else await receive()

    return replayed


def with_length(scope: Scope, length: int) -> Scope:
    others = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
    return {**scope, "headers": [*others, (b"content-length", str(length).encode())]}


def without_keys(scope: Scope) -> Scope:
    """A request without its key, which is nobody's business behind the router."""
    kept = [(name, value) for name, value in scope["headers"] if name not in (b"authorization", b"x-api-key")]
    return {**scope, "headers": kept}


def with_key(scope: Scope, key: str) -> Scope:
    """With the engine's own key, in place of any that the user sent."""
    others = without_keys(scope)["headers"]
    return {**scope, "headers": [*others, (b"authorization", b"Bearer " + key.encode())]}


async def reply(send: Send, status: int, body: object, headers: Headers = ()) -> None:
    content = json.dumps(body).encode()
    common = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*common, *headers]})
    await send({"type": "http.response.body", "body": content})


async def error(
    send: Send, status: int, message: str, kind: str, param: str | None = None, code: str | None = None
) -> None:
    """An error as OpenAI's clients expect it."""
    await reply(send, status, {"error": {"message": message, "type": kind, "param": param, "code": code}})


async def not_ready(send: Send) -> None:
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
    """A request of our own to `app`, as its server would bring it: status and body. `scope` is of any request to it."""
    content, status, answer = json.dumps(body).encode(), 500, bytearray()
    servers = {name: value for name, value in scope.items() if name not in OF_ONE_REQUEST}
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


MAX_BODY_BYTES = 64 << 20
