"""The users of the swap benchmark: they know mixed versions, and tell good answers from bad ones, over real HTTP."""

import asyncio
import json
import time

import pytest
from aiohttp import web

from scripts.tools.bench.swap_users import MIX, PROMPTS, REFUSED, Answer, Users, body


def test_the_shares_of_all_kinds_are_one() -> None:
    assert sum(MIX.values()) == pytest.approx(1.0)
    assert REFUSED.keys() < MIX.keys()


@pytest.mark.parametrize("kind", MIX)
def test_a_request_is_of_its_kind(kind: str) -> None:
    made = body(kind, PROMPTS[0])
    assert made["model"] == ("nobody" if kind == "no model" else "support")
    assert made["prompt"].endswith(PROMPTS[0])
    assert len(made["prompt"]) > 1000 or kind != "too long"


def test_one_version_has_one_answer_to_a_prompt() -> None:
    def said(version: str, text: str, kind: str = "stream", trouble: str = "") -> Answer:
        return Answer(kind, "p", 0.0, version, texts=(text,), trouble=trouble)

    users = Users("http://nobody", 1.0)
    users.answers = [said("v1", "a"), said("v1", "a"), said("v2", "b"), said("v1", "c", "long"),
                     said("v1", "cut", trouble="cut off"), said("v1", "ab", "abort")]  # fmt: skip
    assert users.mixed() == []
    users.answers.append(said("v2", "a"))
    assert users.mixed() == ["v2 to stream 'p': 2 answers"]
    assert [answer.trouble for answer in users.failed()] == ["cut off"]


CUT = web.AppKey("cut", bool)
"""Streams end without their last line."""


async def answer(request: web.Request) -> web.StreamResponse:
    """An engine that answers streams, and refuses what it has to."""
    try:
        asked = json.loads(await request.read())
    except json.JSONDecodeError:
        return web.json_response({"error": "not JSON"}, status=400)
    if asked["model"] != "support" or len(asked["prompt"]) > 2000:
        return web.json_response({"error": "no"}, status=404 if asked["model"] != "support" else 400)
    headers = {"x-umbel-adapter": "support@v1"}
    if "n" in asked:
        return web.json_response({"choices": [{"text": "a"}] * asked["n"]}, headers=headers)
    reply = web.StreamResponse(headers={**headers, "content-type": "text/event-stream"})
    await reply.prepare(request)
    for _ in range(4):
        await reply.write(b'data: {"choices": [{"text": "a"}]}\n\n')
    await reply.write(b"data: [DONE]\n\n" if not request.app[CUT] else b"")
    return reply


def asked_for(seconds: float, *, cut: bool) -> Users:
    async def run() -> Users:
        app = web.Application()
        app[CUT] = cut
        app.router.add_post("/v1/completions", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        users = Users(f"http://127.0.0.1:{runner.addresses[0][1]}", rate=100.0)
        await users.ask(time.perf_counter() + seconds)
        await runner.cleanup()
        return users

    return asyncio.run(run())


def test_answers_and_refusals_that_are_as_they_have_to_be_are_no_trouble() -> None:
    users = asked_for(1.0, cut=False)
    assert {answer.kind for answer in users.answers} == {*MIX}
    assert users.failed() == []
    assert users.mixed() == []
    assert all(answer.ttft > 0 for answer in users.answers if answer.kind == "stream")


def test_a_stream_that_is_cut_off_is_trouble_unless_the_user_left() -> None:
    users = asked_for(0.5, cut=True)
    assert {answer.kind for answer in users.failed()} == {"stream", "long"}
    assert {answer.trouble for answer in users.failed()} == {"status 200, 4 pieces, cut off"}
