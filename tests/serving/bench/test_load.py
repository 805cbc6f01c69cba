"""Open-loop load: requests are sent when they are due; an answer that fails or stays out is a violation."""

import asyncio
import contextlib
import json
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from serving.bench.load import Client, Outcome, sleep_until
from serving.bench.trace import Arrival

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@contextlib.asynccontextmanager
async def served(handler: Handler) -> AsyncIterator[Client]:
    """A client of a real HTTP server."""
    app = web.Application()
    app.router.add_post("/v1/completions", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    client = Client(f"http://{host}:{port}", "support", prompt_ids=range(2, 12))
    try:
        yield client
    finally:
        await client.close()
        await runner.cleanup()


def send(handler: Handler, workload: list[Arrival], drain_s: float = 30.0) -> list[Outcome]:
    async def run() -> list[Outcome]:
        async with served(handler) as client:
            return await client.run(workload, seed=0, drain_s=drain_s, began=time.perf_counter())

    return asyncio.run(run())


async def stream(request: web.Request, events: list[Any], version: str = "support@v3") -> web.StreamResponse:
    reply = web.StreamResponse(headers={"x-umbel-adapter": version})
    await reply.prepare(request)
    for event in events:
        await reply.write(
            f"data: {event if isinstance(event, str) else json.dumps(event, separators=(',', ':'))}\n\n".encode()
        )
    return reply


def token() -> dict[str, Any]:
    return {"choices": [{"text": "s1"}]}


def usage(tokens: int) -> dict[str, Any]:
    return {"id": "x", "choices": [], "usage": {"completion_tokens": tokens}}


async def answer(request: web.Request) -> web.StreamResponse:
    tokens = (await request.json())["max_tokens"]
    return await stream(request, [*[token()] * tokens, usage(tokens), "[DONE]"])


def test_an_answer_is_followed_to_its_last_token() -> None:
    (outcome,) = send(answer, [Arrival(0.0, prompt=5, output=4)])
    assert (outcome.ok, outcome.tokens, outcome.version) == (True, 4, "support@v3")
    assert 0 < outcome.first <= outcome.last
    assert outcome.ttft == outcome.first
    assert outcome.tpot == pytest.approx((outcome.last - outcome.first) / 3)


def test_an_answer_of_one_token_has_no_time_per_token() -> None:
    (outcome,) = send(answer, [Arrival(0.0, prompt=5, output=1)])
    assert outcome.ok
    assert math.isnan(outcome.tpot)


def test_nobody_waits_for_the_answer_to_another() -> None:
    """All requests are there before the first one is answered: a closed loop would wait for ever."""
    came, all_there = 0, asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal came
        came += 1
        if came == 20:
            all_there.set()
        await all_there.wait()
        return await answer(request)

    outcomes = send(handler, [Arrival(0.001 * number, 3, 2) for number in range(20)])
    assert [outcome.ok for outcome in outcomes] == [True] * 20


def test_a_request_is_late_from_when_it_was_due() -> None:
    """The same first token, a second after one request was due and at once for the other."""
    early, late = (Outcome(Arrival(at, 1, 2), first=3.0, last=3.5, tokens=2) for at in (2.0, 3.0))
    assert (early.ttft, late.ttft) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("events", "why"),
    [
        ([token(), usage(1)], ""),
        ([], ""),
        ([token(), {"error": {"message": "out of memory"}}, "[DONE]"], "out of memory"),
    ],
)
def test_an_answer_that_is_cut_short_is_not_ok(events: list[Any], why: str) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return await stream(request, events)

    (outcome,) = send(handler, [Arrival(0.0, 3, 2)])
    assert not outcome.ok
    assert why in outcome.error


def test_a_refusal_and_an_answer_that_stays_out_are_not_ok() -> None:
    async def refuse(request: web.Request) -> web.StreamResponse:
        return web.Response(status=503, text="draining")

    async def hang(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(3600)
        raise AssertionError

    (refused,), (hung,) = send(refuse, [Arrival(0.0, 3, 2)]), send(hang, [Arrival(0.0, 3, 2)], drain_s=0.2)
    assert (refused.ok, refused.error) == (False, "503: draining")
    assert (hung.ok, hung.error) == (False, "no answer within the drain")


def test_another_seed_draws_other_prompts_of_the_same_lengths() -> None:
    prompts: list[list[int]] = []

    async def note(request: web.Request) -> web.StreamResponse:
        prompts.append((await request.json())["prompt"])
        return await answer(request)

    async def run() -> None:
        async with served(note) as client:
            for seed in (0, 1, 0):
                await client.run([Arrival(0.0, 12, 1)], seed, 30.0, time.perf_counter())

    asyncio.run(run())
    assert [len(prompt) for prompt in prompts] == [12, 12, 12]
    assert prompts[0] == prompts[2] != prompts[1]


def test_no_request_is_sent_before_it_is_due_on_a_loop_whose_timers_end_early(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda seconds: whole(seconds / 2))  # uvloop's do, by a millisecond

    async def slept() -> float:
        due = time.perf_counter() + 0.01
        await sleep_until(due)
        return time.perf_counter() - due

    assert asyncio.run(slept()) >= 0
