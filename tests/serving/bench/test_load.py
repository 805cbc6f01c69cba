"""Open-loop load: what is sent and when is fixed before the run; an answer that fails or stays out is a violation."""

import asyncio
import contextlib
import json
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from serving.bench.load import Client, Outcome
from serving.bench.trace import CORE, Arrival, Trace
from umbel.errors import ConfigError

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

CSV = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.0000000,374,44
2023-11-16 18:15:48.0000000,8000,1600
2023-11-16 18:15:49.0000000,16,8
2023-11-16 18:15:50.0000000,160,32
"""


@pytest.fixture
def trace(tmp_path: Path) -> Trace:
    (tmp_path / "trace.csv").write_text(CSV)
    return Trace.read(tmp_path / "trace.csv")


def test_a_trace_is_scaled_and_capped(trace: Trace) -> None:
    assert trace.lengths == [(23, 2), (CORE.prompt, CORE.output), (1, 1), (10, 2)]


def test_a_replay_has_the_wanted_rate_and_the_traces_rhythm(trace: Trace) -> None:
    arrivals = trace.replay(rate=1.5, seconds=2.0, start=0.0)
    assert [arrival.at for arrival in arrivals] == pytest.approx([0.0, 1.0, 1.5])
    assert [(arrival.prompt, arrival.output) for arrival in arrivals] == trace.lengths[:3]
    assert trace.replay(rate=1.5, seconds=2.0, start=0.0) == arrivals, "fixed before the run"


def test_a_replay_longer_than_the_trace_is_refused(trace: Trace) -> None:
    with pytest.raises(ConfigError, match="4 requests, fewer than the 40"):
        trace.replay(rate=20.0, seconds=2.0, start=0.0)


@pytest.mark.parametrize(
    "content",
    [None, "", "a,b\n1,2\n", CSV.replace("374", "many"), CSV.splitlines()[0] + "\n", CSV.replace("2023-", "x")],
)
def test_what_is_no_trace_is_refused_by_name(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "trace.csv").write_text(content)
    with pytest.raises(ConfigError, match=r"trace\.csv: (not a trace|a trace of 0 requests)"):
        Trace.read(tmp_path / "trace.csv")


def test_without_a_trace_lengths_are_like_the_published_ones() -> None:
    lengths = np.array(Trace.fitted().lengths)
    assert np.median(lengths, axis=0) == pytest.approx([1020 / 16, 129 / 16], rel=0.1)


def test_bursty_arrivals_vary_more_than_poisson_at_the_same_rate() -> None:
    trace = Trace.fitted()
    poisson, bursty = (
        np.diff([a.at for a in draw]) for draw in (trace.poisson(20, 500, seed=1), trace.gamma(20, 500, seed=1))
    )
    assert len(poisson) == pytest.approx(20 * 500, rel=0.1)
    assert len(bursty) == pytest.approx(20 * 500, rel=0.25)
    assert poisson.std() / poisson.mean() == pytest.approx(1.0, rel=0.1)
    assert bursty.std() / bursty.mean() == pytest.approx(4.0, rel=0.2)


def test_a_square_wave_is_low_in_the_first_half_of_each_period() -> None:
    times = np.array([a.at for a in Trace.fitted().square(low=5, high=20, seconds=600, period=10, seed=0)])
    high = (times % 10) >= 5
    assert high.sum() / 300 == pytest.approx(20, rel=0.1)
    assert (~high).sum() / 300 == pytest.approx(5, rel=0.15)


@contextlib.asynccontextmanager
async def served(handler: Handler) -> AsyncIterator[Client]:
    """A client of a real HTTP server."""
    app = web.Application()
    app.router.add_post("/v1/completions", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    client = Client(f"http://{host}:{port}", "support", symbols=10)
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
