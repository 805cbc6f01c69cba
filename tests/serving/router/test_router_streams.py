"""Requests on their way through the router: streams, promotions in between, errors, clients that go away."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from serving.aliases import AliasTable
from serving.router.asgi import ASGIApp, Message, Receive, Scope, Send
from serving.router.pin import apply_pin
from serving.router.router import Router

KEY = "k" * 64
SCOPE: Scope = {"type": "http", "method": "POST", "path": "/v1/responses", "headers": []}
Body = Callable[[Receive, Send], Coroutine[Any, Any, None]]


def table(live: str | None) -> AliasTable:
    versions = ("support@v1", "support@v2")
    return AliasTable(base="tiny", adapters={"support": {"live": live}}, addressable=versions)


def make(tmp_path: Path, body: Body, live: str | None = "support@v1") -> Router:
    table(live).write(tmp_path / "aliases.json")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await body(receive, send)

    made: ASGIApp = app
    return Router(made, tmp_path / "aliases.json", KEY, 512)


def start() -> Message:
    return {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}


def event(text: bytes, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": text, "more_body": more}


def pinned() -> str | None:
    """Return the version that the tokenizer manager would generate with now."""
    asked = SimpleNamespace(lora_path="asked for", extra_key="asked for")
    apply_pin(None, asked)
    return asked.lora_path


async def request(router: Router, sent: list[Message], model: str = "support") -> None:
    messages: list[Message] = [{"type": "http.request", "body": json.dumps({"model": model}).encode()}]

    async def receive() -> Message:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    await router(SCOPE, receive, send)


async def in_flight(router: Router) -> dict[str, int]:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        raise AssertionError("nothing is read")

    headers = [(b"authorization", f"Bearer {KEY}".encode())]
    await router({**SCOPE, "path": "/umbel/inflight", "headers": headers}, receive, send)
    counts: dict[str, int] = json.loads(sent[1]["body"])
    return counts


def labels(message: Message) -> list[bytes]:
    return [value for name, value in message["headers"] if name == b"x-umbel-adapter"]


def test_a_stream_is_held_back_until_its_version_is_applied(tmp_path: Path) -> None:
    sent: list[Message] = []
    seen: list[int] = []

    async def body(receive: Receive, send: Send) -> None:
        await send(start())
        await send(event(b"created"))
        seen.append(len(sent))
        pinned()
        for text in (b"one", b"two"):
            await send(event(text))
            seen.append(len(sent))
        await send(event(b"", more=False))

    asyncio.run(request(make(tmp_path, body), sent))
    assert seen == [0, 3, 4], "nothing before, all of it with the first event after, then each as it comes"
    assert [message.get("body") for message in sent] == [None, b"created", b"one", b"two", b""]
    assert labels(sent[0]) == [b"support@v1"]
    assert (b"content-type", b"text/event-stream") in sent[0]["headers"]


def test_an_answer_that_was_never_generated_is_sent_without_a_version(tmp_path: Path) -> None:
    async def body(receive: Receive, send: Send) -> None:
        await send({**start(), "status": 400})
        await send(event(b"bad", more=False))

    sent: list[Message] = []
    asyncio.run(request(make(tmp_path, body), sent))
    assert (sent[0]["status"], labels(sent[0]), sent[1]["body"]) == (400, [], b"bad")


def test_a_promotion_does_not_touch_a_request_that_runs(tmp_path: Path) -> None:
    """A request may call the engine several times, as /v1/responses does with its tools."""
    used: list[str | None] = []
    first, second = list[Message](), list[Message]()

    async def main() -> None:
        accepted, go_on = asyncio.Event(), asyncio.Event()

        async def body(receive: Receive, send: Send) -> None:
            accepted.set()
            await go_on.wait()
            used.extend([pinned(), await asyncio.create_task(background())])
            await send(start())
            await send(event(b"", more=False))

        async def background() -> str | None:
            return pinned()

        router = make(tmp_path, body)
        running = asyncio.create_task(request(router, first))
        await accepted.wait()
        router.table = table("support@v2")
        go_on.set()
        later = asyncio.create_task(request(router, second))
        await asyncio.gather(running, later)

    asyncio.run(main())
    assert used == ["support-v1", "support-v1", "support-v2", "support-v2"]
    assert (labels(first[0]), labels(second[0])) == ([b"support@v1"], [b"support@v2"])


def test_requests_at_the_same_time_keep_their_own_versions(tmp_path: Path) -> None:
    models = ["tiny", "support", "support@v2", "support@v1"] * 8
    used: list[list[Message]] = [[] for _ in models]

    async def body(receive: Receive, send: Send) -> None:
        model = json.loads((await receive())["body"])["model"]
        for _ in range(3):
            await asyncio.sleep(0)
        answer = json.dumps([model, pinned()]).encode()
        await send(start())
        await send(event(answer, more=False))

    async def main() -> None:
        router = make(tmp_path, body)
        await asyncio.gather(
            *(asyncio.create_task(request(router, sent, model)) for sent, model in zip(used, models, strict=True))
        )
        assert await in_flight(router) == {}

    asyncio.run(main())
    expected = {"tiny": (None, b"base"), "support": ("support-v1", b"support@v1"),
                "support@v1": ("support-v1", b"support@v1"), "support@v2": ("support-v2", b"support@v2")}  # fmt: skip
    for model, sent in zip(models, used, strict=True):
        assert json.loads(sent[1]["body"]) == [model, expected[model][0]]
        assert labels(sent[0]) == [expected[model][1]]


@pytest.mark.parametrize(("model", "label"), [("support", "support@v1"), ("tiny", "base")])
@pytest.mark.parametrize("ending", ["answers", "raises before", "raises within", "client goes", "is cancelled"])
def test_what_is_in_flight_is_counted_and_counted_down_however_it_ends(
    tmp_path: Path, ending: str, model: str, label: str
) -> None:
    class Broken(Exception):
        pass

    async def main() -> None:
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def body(receive: Receive, send: Send) -> None:
            begun.set()
            await go_on.wait()
            if ending == "raises before":
                raise Broken
            pinned()
            await send(start())
            await send(event(b"a"))
            if ending == "raises within":
                raise Broken
            if ending == "client goes":
                await receive()  # the body
                assert (await receive())["type"] == "http.disconnect"
                raise asyncio.CancelledError
            await send(event(b"", more=False))

        router, sent = make(tmp_path, body), list[Message]()
        tasks = [asyncio.create_task(request(router, sent, model)) for _ in range(3)]
        await begun.wait()
        assert await in_flight(router) == {label: 3}
        if ending == "is cancelled":
            for task in tasks:
                task.cancel()
        go_on.set()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        expected = {"answers": type(None), "raises before": Broken, "raises within": Broken}
        assert [type(end) for end in ends] == [expected.get(ending, asyncio.CancelledError)] * 3
        assert await in_flight(router) == {}

    asyncio.run(main())


def test_a_client_that_goes_before_its_body_is_whole_generates_nothing(tmp_path: Path) -> None:
    reached: list[int] = []

    async def body(receive: Receive, send: Send) -> None:
        reached.append(1)

    messages: list[Message] = [{"type": "http.request", "body": b'{"model": "tiny"', "more_body": True}]

    async def receive() -> Message:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        pass

    router = make(tmp_path, body)
    asyncio.run(router(SCOPE, receive, send))  # type: ignore[arg-type]
    assert reached == []
    assert router.in_flight.total() == 0
