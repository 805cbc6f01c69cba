"""Counts of each version's answers: good ends, the site's errors, latencies; a client's own mistakes do not count."""

import asyncio
import contextlib
import itertools
import json
import math
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from serving.router.asgi import Message, Receive, Send
from serving.router.traffic import Traffic
from serving.router.user_counts import KEPT_USERS
from serving.traffic_report import UserTraffic

Body = Callable[[Receive, Send], Coroutine[Any, Any, None]]
STREAM = [(b"content-type", b"text/event-stream; charset=utf-8")]


class Broken(Exception):
    pass


def start(status: int = 200, headers: list[tuple[bytes, bytes]] | None = None) -> Message:
    return {"type": "http.response.start", "status": status, "headers": headers or []}


def part(body: bytes, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}


def answered(traffic: Traffic, body: Body, *messages: Message, user: str | None = "u") -> list[Message]:
    """Follow one answer; return the messages that the client was sent."""
    sent: list[Message] = []
    coming = list(messages)

    async def receive() -> Message:
        return coming.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    async def main() -> None:
        with traffic.answer("support@v1", "support", user) as answer:
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
    seconds = itertools.count(step=2)
    traffic = Traffic(clock=lambda: float(next(seconds)))
    answered(traffic, story(start(200, STREAM), TOKEN, TOKEN, TOKEN, LAST))
    answered(traffic, story(start(200, STREAM), TOKEN, LAST))
    answered(traffic, story(start(), part(b"{}", more=False)))
    answered(traffic, story(start(500, STREAM), TOKEN, LAST))
    found = traffic.report()["support@v1"]
    assert (found.requests, found.errors, found.streams, found.chunks) == (4, 1, 2, 4)
    (user,) = found.by_user.values()
    took = (2 * math.log(2), math.log(2))  # the clock ticks once for each look at it
    assert user == UserTraffic(requests=4, errors=1, streams=2, log_ttft=took[0], paced=1, log_tpot=took[1])


def test_answers_and_ratings_are_counted_by_user_under_a_code_of_this_run_only() -> None:
    first, second = Traffic(clock=lambda: 0.0), Traffic(clock=lambda: 0.0)
    for traffic in (first, second):
        for number, user in enumerate(("anna", "anna", "bert", None)):
            body = part(f'{{"id": "a{number}"}}'.encode(), more=False)
            answered(traffic, story(start(), body), user=user)
        for answer, rating in (("a0", "up"), ("a0", "down"), ("a2", "up"), ("a3", "up")):
            traffic.rate(answer, rating)  # type: ignore[arg-type]
    found, other = (traffic.report()["support@v1"] for traffic in (first, second))
    assert (found.requests, found.up, found.down, found.users) == (4, 2, 1, 2)
    expected = [UserTraffic(requests=2, down=1), UserTraffic(requests=1, up=1)]
    assert sorted(found.by_user.values(), key=lambda user: -user.requests) == expected
    assert not set(found.by_user) & set(other.by_user)


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


def test_a_bounded_number_of_users_is_kept_and_versions_that_are_gone_are_forgotten() -> None:
    traffic = Traffic(clock=lambda: 0.0)
    number = 4 * KEPT_USERS
    for user in range(number):
        with traffic.answer("support@v1", "support", str(user)) as answer:
            asyncio.run(_send_all(answer.send(_nowhere), start(200, STREAM), TOKEN, LAST))
    found = traffic.report()["support@v1"]
    assert (found.requests, found.streams, len(found.by_user)) == (number, number, KEPT_USERS)
    assert abs(found.users - number) < number / 4, "five times the standard error of the estimate"
    traffic.forget_all_but({"base"})
    assert traffic.report() == {}


async def _nowhere(message: Message) -> None: ...


async def _send_all(send: Send, *messages: Message) -> None:
    for message in messages:
        await send(message)
