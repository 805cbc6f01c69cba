"""Raw ASGI: bodies that are read and replayed, headers that are replaced, answers, and requests of the router's own."""

import asyncio
import json
from collections.abc import Awaitable, Callable

import pytest

from serving.router import asgi
from serving.router.asgi import Message, Receive, Scope, Send
from serving.router.bodies import MAX_BODY_BYTES
from serving.router.router import Router
from tests.toys.serving.router import CHAT, Inner, call

KEYS = [(b"authorization", b"Bearer user"), (b"x-api-key", b"user")]


def receiving(*messages: Message) -> Receive:
    """A client that sends these, then leaves."""
    coming = list(messages)

    async def receive() -> Message:
        return coming.pop(0) if coming else {"type": "http.disconnect"}

    return receive


def sent(answer: Callable[[Send], Awaitable[None]]) -> list[Message]:
    """Return the messages that were sent."""
    messages: list[Message] = []

    async def send(message: Message) -> None:
        messages.append(message)

    async def main() -> None:
        await answer(send)

    asyncio.run(main())
    return messages


def part(body: bytes, more: bool = True) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


def test_a_body_over_the_limit_is_413_before_it_is_read_to_its_end(router: Router, inner: Inner) -> None:
    chunk: Message = part(b" " * (MAX_BODY_BYTES // 4))
    messages = [chunk] * 100
    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": []}
    sent = asyncio.run(call(router, scope, messages))
    assert (sent[0]["status"], len(messages)) == (413, 95), "five of a hundred chunks were read"
    assert inner.paths == []


@pytest.mark.parametrize(("most", "read"), [(6, b"abcdef"), (5, None)])
def test_a_body_is_read_from_all_its_chunks_up_to_the_limit(most: int, read: bytes | None) -> None:
    receive = receiving(part(b"abc"), part(b""), part(b"def", more=False))
    assert asyncio.run(asgi.read_body(receive, most)) == read


def test_a_body_is_given_once_more_and_then_what_the_client_sends() -> None:
    replayed = asgi.Replay(b"abc", receiving())

    async def both() -> list[Message]:
        return [await replayed(), await replayed()]

    assert asyncio.run(both()) == [part(b"abc", more=False), {"type": "http.disconnect"}]


def test_headers_are_replaced_and_the_request_itself_is_not_changed() -> None:
    others = [(b"accept", b"*/*"), (b"x-umbel-user", b"eva")]
    scope: Scope = {"type": "http", "path": CHAT, "headers": [*others, *KEYS, (b"content-length", b"7")]}
    before = [*scope["headers"]]
    assert asgi.without_keys(scope)["headers"] == [*others, (b"content-length", b"7")]
    assert asgi.with_key(scope, "own")["headers"][-1] == (b"authorization", b"Bearer own")
    assert not {*KEYS} & {*asgi.with_key(scope, "own")["headers"]}
    assert asgi.with_length(scope, 12)["headers"] == [*others, *KEYS, (b"content-length", b"12")]
    assert scope["headers"] == before


def test_an_error_looks_as_openais_clients_expect_it() -> None:
    start, body = sent(lambda send: asgi.error(send, 418, "Short and stout.", "teapot", "model", "too_hot"))
    told = {"message": "Short and stout.", "type": "teapot", "param": "model", "code": "too_hot"}
    assert (start["status"], json.loads(body["body"])) == (418, {"error": told})
    assert dict(start["headers"])[b"content-length"] == str(len(body["body"])).encode()
    assert dict(start["headers"])[b"content-type"] == b"application/json"


def test_a_site_that_is_not_ready_says_when_to_come_back() -> None:
    start, body = sent(asgi.not_ready)
    assert (start["status"], dict(start["headers"])[b"retry-after"]) == (503, b"2")
    assert json.loads(body["body"])["error"]["code"] == "not_ready"


def test_a_request_of_our_own_has_the_engines_key_and_nothing_of_the_users() -> None:
    seen: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)
        body = (await receive())["body"]
        assert dict(scope["headers"])[b"content-length"] == str(len(body)).encode()
        await send({"type": "http.response.start", "status": 201, "headers": []})
        for half in (body[:3], body[3:]):
            await send({"type": "http.response.body", "body": half, "more_body": True})

    users: Scope = {
        "type": "http", "method": "GET", "path": "/v1/models", "query_string": b"a=b", "headers": [*KEYS],
        "server": ("127.0.0.1", 30000), "state": {},
    }  # fmt: skip
    status, answer = asyncio.run(asgi.post(app, users, CHAT, {"model": "support"}, "own"))
    assert (status, json.loads(answer)) == (201, {"model": "support"})
    (asked,) = seen
    assert (asked["method"], asked["path"], asked["raw_path"]) == ("POST", CHAT, CHAT.encode())
    assert (asked["query_string"], asked["server"]) == (b"", users["server"])
    assert dict(asked["headers"])[b"authorization"] == b"Bearer own"
    assert not {*KEYS} & {*asked["headers"]}
