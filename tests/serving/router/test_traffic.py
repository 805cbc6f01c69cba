"""Counts of each version's answers: good ends, the site's errors, latencies; a client's own mistakes do not count."""

import asyncio
import contextlib
import itertools
import json
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from serving.router.asgi import Message, Receive, Send
from serving.router.traffic import KEPT, Traffic

Body = Callable[[Receive, Send], Coroutine[Any, Any, None]]
STREAM = [(b"content-type", b"text/event-stream; charset=utf-8")]


class Broken(Exception):
    pass


def start(status: int = 200, headers: list[tuple[bytes, bytes]] | None = None) -> Message:
    return {"type": "http.response.start", "status": status, "headers": headers or []}


def part(body: bytes, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}


def answered(traffic: Traffic, body: Body, *messages: Message) -> list[Message]:
    """Follow one answer; return the messages that the client was sent."""
    sent: list[Message] = []
    coming = list(messages)

    async def receive() -> Message:
        return coming.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    async def main() -> None:
        with traffic.answer("support@v1") as answer:
            await body(answer.receive(receive), answer.send(send))

    asyncio.run(main())
    return sent


def story(*messages: Message, then: BaseException | None = None, reads: int = 0) -> Body:
    async def body(receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)
        for _ in range(reads):
            await receive()
        if then is not None:
            raise then

    return body


def failure(code: int) -> bytes:
    return f"data: {json.dumps({'error': {'object': 'error', 'message': 'm', 'code': code}})}\n\n".encode()


GONE: Message = {"type": "http.disconnect"}
TOKEN, LAST = part(b"data: {}\n\n"), part(b"", more=False)


@pytest.mark.parametrize(
    ("body", "requests", "errors"),
    [
        (story(start(), part(b"{}", more=False)), 1, 0),
        (story(start(200, STREAM), TOKEN, TOKEN, LAST), 1, 0),
        (story(start(500), part(b"{}", more=False)), 1, 1),
        (story(start(503), part(b"{}", more=False)), 1, 1),
        (story(then=Broken()), 1, 1),
        (story(start(200, STREAM), TOKEN, then=Broken()), 1, 1),
        (story(start(200, STREAM), TOKEN), 1, 1),
        (story(start(200, STREAM), TOKEN, part(failure(500)), LAST), 1, 1),
        (story(start(200, STREAM), part(b'data: {"error": "cut'), LAST), 1, 1),
        (story(start(200, STREAM), part(failure(400)), LAST), 1, 0),
        (story(start(400), part(b"{}", more=False)), 0, 0),
        (story(start(404), part(b"{}", more=False)), 0, 0),
        (story(start(200, STREAM), TOKEN, reads=1), 0, 0),
        (story(start(200, STREAM), TOKEN, reads=1, then=Broken()), 0, 0),
        (story(start(200, STREAM), TOKEN, then=asyncio.CancelledError()), 0, 0),
        (story(start(200, STREAM), TOKEN, LAST, reads=1), 1, 0),
    ],
    ids=["whole", "stream", "500", "503", "raises", "raises within", "breaks off", "says it failed", "says it oddly",
         "says 400", "400", "404", "client leaves", "client leaves, raises", "cancelled", "left after its end"],
)  # fmt: skip
def test_errors_are_the_sites_own(body: Body, requests: int, errors: int) -> None:
    traffic = Traffic()
    with contextlib.suppress(Broken, asyncio.CancelledError):
        answered(traffic, body, GONE)
    found = traffic.report()["support@v1"]
    assert (found.requests, found.errors, traffic.waiting) == (requests, errors, 0)


def test_what_is_sent_is_what_was_given() -> None:
    messages = [start(200, STREAM), part(b"a"), part(b"b"), LAST]
    assert answered(Traffic(), story(*messages)) == messages


def test_latencies_are_of_streams_and_by_the_chunk() -> None:
    seconds = itertools.count()
    traffic = Traffic(clock=lambda: float(next(seconds)))
    answered(traffic, story(start(200, STREAM), TOKEN, TOKEN, TOKEN, LAST))
    answered(traffic, story(start(), part(b"{}", more=False)))
    answered(traffic, story(start(500, STREAM), TOKEN, LAST))
    found = traffic.report()["support@v1"]
    assert (found.requests, found.errors, found.streams, found.chunks) == (3, 1, 1, 3)
    assert (found.ttft_s, found.tpot_s) == ((1.0,), (1.0,)), "the clock ticks once for each look at it"


def test_a_user_waits_until_something_is_sent() -> None:
    traffic = Traffic()
    seen: list[int] = []

    async def body(receive: Receive, send: Send) -> None:
        seen.append(traffic.waiting)
        await send(start(200, STREAM))
        seen.append(traffic.waiting)
        await send(TOKEN)
        seen.append(traffic.waiting)
        await send(LAST)

    answered(traffic, body)
    assert seen == [1, 1, 0]


def test_only_the_last_latencies_are_kept_and_versions_that_are_gone_are_forgotten() -> None:
    traffic = Traffic(clock=lambda: 0.0)
    for _ in range(KEPT + 5):
        with traffic.answer("support@v1") as answer:
            send = answer.send(_nowhere)
            asyncio.run(_send_all(send, start(200, STREAM), TOKEN, LAST))
    found = traffic.report()["support@v1"]
    assert (found.requests, found.streams, len(found.ttft_s), len(found.tpot_s)) == (KEPT + 5, KEPT + 5, KEPT, KEPT)
    traffic.forget_all_but({"base"})
    assert traffic.report() == {}


async def _nowhere(message: Message) -> None: ...


async def _send_all(send: Send, *messages: Message) -> None:
    for message in messages:
        await send(message)
