"""Long bodies: how many bytes of them are in memory at a time, whose turn it is, and what parsing one costs."""

import asyncio
import json
import tracemalloc
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from serving.router.asgi import Message, Receive, Replay, Scope, Send
from serving.router.bodies import LONG_BYTES, MAX_BODY_BYTES, Bodies, BodyRefused
from serving.router.consent import Consent
from serving.router.fields.body import parse, serialise
from serving.router.fields.routes import checked
from serving.router.router import Router
from serving.user_example import ConsentSettings
from tests.toys.serving.router import CHAT, Inner, call

LONG = 4 * LONG_BYTES


def scope(length: int | None = None) -> Scope:
    headers = [] if length is None else [(b"content-length", str(length).encode())]
    return {"type": "http", "method": "POST", "path": CHAT, "headers": headers}


class Client:
    """Sends a body in chunks, from the third on only when it is let."""

    def __init__(self, length: int = LONG) -> None:
        self.left = length
        self.reads = 0
        self.goes_on = asyncio.Event()

    async def receive(self) -> Message:
        self.reads += 1
        if self.reads > 2:
            await self.goes_on.wait()
        chunk = min(self.left, LONG_BYTES)
        self.left -= chunk
        return {"type": "http.request", "body": bytes(chunk), "more_body": self.left > 0}


async def asking(bodies: Bodies, client: Client, ended: asyncio.Event, length: int | None = LONG) -> int:
    """Read a client's body, and hold it until its answer has `ended`; return its length."""
    async with bodies.read(scope(length), client.receive) as body:
        await ended.wait()
        return len(body)


async def settle() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


def run(main: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), 60))  # type: ignore[arg-type]


def test_long_bodies_are_read_while_there_is_room_and_the_next_one_when_an_answer_has_ended() -> None:
    async def main() -> None:
        bodies, ended = Bodies(room=2 * LONG), [asyncio.Event() for _ in range(3)]
        clients = [Client() for _ in range(3)]
        for client in clients:
            client.goes_on.set()
        tasks = [asyncio.create_task(asking(bodies, *pair)) for pair in zip(clients, ended, strict=True)]
        await settle()
        assert [client.left for client in clients] == [0, 0, LONG - 2 * LONG_BYTES]
        assert (bodies.free, clients[2].reads) == (0, 2), "nothing more is read from who waits"
        ended[0].set()
        await settle()
        assert clients[2].left == 0
        for event in ended:
            event.set()
        assert await asyncio.gather(*tasks) == [LONG] * 3
        assert bodies.free == 2 * LONG

    run(main)


def test_short_bodies_wait_for_nobody() -> None:
    async def main() -> None:
        bodies, ended = Bodies(room=LONG), asyncio.Event()
        slow = asyncio.create_task(asking(bodies, Client(), ended))
        await settle()
        short = Client(LONG_BYTES)
        async with bodies.read(scope(LONG_BYTES), short.receive) as body:
            assert (len(body), bodies.free) == (LONG_BYTES, 0)
        slow.cancel()
        await asyncio.wait([slow])
        assert bodies.free == LONG, "who leaves gives the room back"

    run(main)


def test_who_says_no_length_takes_room_for_the_longest_and_gives_back_what_did_not_come() -> None:
    async def main() -> None:
        bodies, ended, client = Bodies(), asyncio.Event(), Client()
        whole = bodies.free
        task = asyncio.create_task(asking(bodies, client, ended, length=None))
        await settle()
        assert bodies.free == whole - MAX_BODY_BYTES
        client.goes_on.set()
        await settle()
        assert bodies.free == whole - LONG
        ended.set()
        await task
        assert bodies.free == whole

    run(main)


def test_a_slow_sender_loses_its_turn_to_who_waits_behind_it() -> None:
    async def main() -> None:
        bodies, ended = Bodies(room=LONG, sent_s=0.05), asyncio.Event()
        slow, next_ = Client(), Client()
        next_.goes_on.set()
        ended.set()
        tasks = [asyncio.create_task(asking(bodies, client, ended)) for client in (slow, next_)]
        with pytest.raises(BodyRefused, match=r"did not come within 0\.05 s") as refused:
            await tasks[0]
        assert refused.value.status == 408
        assert await tasks[1] == LONG
        assert bodies.free == LONG

    run(main)


def test_who_waits_too_long_is_asked_to_come_again() -> None:
    async def main() -> None:
        bodies = Bodies(room=LONG - 1, turn_s=0.05)
        with pytest.raises(BodyRefused, match="try again") as refused:
            await asking(bodies, Client(), asyncio.Event())
        assert (refused.value.status, refused.value.code) == (503, "busy")
        assert bodies.free == LONG - 1

    run(main)


def test_who_leaves_while_waiting_holds_nobody_up() -> None:
    async def main() -> None:
        bodies, ended = Bodies(room=LONG), asyncio.Event()
        first, large, small = Client(LONG // 2), Client(), Client(LONG // 2)
        for client in (first, large, small):
            client.goes_on.set()
        holding = asyncio.create_task(asking(bodies, first, ended, length=LONG // 2))
        await settle()
        waiting = asyncio.create_task(asking(bodies, large, ended))
        await settle()
        behind = asyncio.create_task(asking(bodies, small, ended, length=LONG // 2))
        await settle()
        assert bodies.free == LONG // 2, "first come, first served"
        waiting.cancel()
        await settle()
        assert bodies.free == 0
        ended.set()
        assert [await holding, await behind] == [LONG // 2] * 2
        assert bodies.free == LONG

    run(main)


@pytest.mark.parametrize("length", [None, MAX_BODY_BYTES + 1, 10**30])
def test_a_body_over_the_limit_is_refused_before_it_is_held(length: int | None) -> None:
    async def main() -> None:
        bodies, client = Bodies(), Client(10**9)
        client.goes_on.set()
        whole = bodies.free
        with pytest.raises(BodyRefused, match="over 8 MiB"):
            await asking(bodies, client, asyncio.Event(), length)
        assert client.reads * LONG_BYTES <= MAX_BODY_BYTES + LONG_BYTES
        assert (client.reads == 0) == (length == MAX_BODY_BYTES + 1)
        assert bodies.free == whole

        async def in_one_piece() -> Message:
            return {"type": "http.request", "body": bytes(MAX_BODY_BYTES + 1), "more_body": False}

        with pytest.raises(BodyRefused, match="over 8 MiB"):
            async with bodies.read(scope(), in_one_piece):
                raise AssertionError("never reached")
        assert bodies.free == whole

    run(main)


def test_a_body_that_was_read_already_is_counted_once_with_consent_around_the_router(
    router: Router, inner: Inner
) -> None:
    seen: list[int] = []

    async def look(receive: Receive, send: Send) -> None:
        seen.append(router.bodies.free)

    inner.before = look
    settings = ConsentSettings(key="ab" * 32, socket="operator.sock", models={"support": "support"})  # type: ignore[arg-type]
    consent: Any = Consent(router, settings, bodies=router.bodies)
    whole, text = router.bodies.free, "a" * LONG
    body = json.dumps({"model": "support", "messages": [{"role": "user", "content": text}]}).encode()
    asked = {**scope(len(body)), "headers": [*scope(len(body))["headers"], (b"x-umbel-consent", b"train")]}
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    assert asyncio.run(call(consent, asked, messages))[0]["status"] == 200
    assert seen == [whole - len(body)]
    assert router.bodies.free == whole


def test_a_replay_is_not_read_again() -> None:
    async def main() -> None:
        async with Bodies(room=0).read(scope(), Replay(bytes(LONG), Client().receive)) as body:
            assert len(body) == LONG

    run(main)


@pytest.mark.parametrize("item", [b"{}", b"[]", b'{"a":{}}', '"中"'.encode(), b"[0]", b"151643"])
def test_what_the_router_makes_of_a_body_has_at_most_fifty_bytes_for_one_of_it(item: bytes) -> None:
    head = b'{"model":"tiny","messages":[{"role":"assistant","tool_calls":[{"function":{"name":"f","arguments":['
    body = head + b",".join([item] * (MAX_BODY_BYTES // 16 // (len(item) + 1))) + b"]}}]}]}"
    tracemalloc.start()
    try:
        request = checked(CHAT, parse(body), 512)
        assert len(serialise(request)) <= len(body)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 50 * len(body), f"{peak / len(body):.1f} for one"
