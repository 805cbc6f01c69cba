"""The mirror: requests that are replayed on the shadow and requests that are not, and the comparison of the answers."""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import pytest

from serving.priorities import Priority
from serving.router import mirror
from serving.router.mirror import agreement, refuses, said, said_in_stream
from serving.traffic_report import MirrorTraffic
from tests.toys.chat import ADMIN, CHAT, KEY, Site

SHADOW, LIVE = "support-v3", "support-v2"


def run(folder: Path, story: Callable[[Site, httpx.AsyncClient], Awaitable[None]], share: float = 1.0) -> None:
    async def main() -> None:
        site = Site(folder, mirror={"support": share} if share else {})
        async with asyncio.timeout(20), site.open() as http:
            await story(site, http)

    asyncio.run(main())


async def replayed(site: Site) -> MirrorTraffic:
    """Wait until nothing is left to replay; return the shadow's comparison."""
    while (work := site.router.mirror._work) is not None and not work.done():
        await asyncio.gather(work, return_exceptions=True)
    return site.router.mirror.report().get("support@v3", MirrorTraffic())


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_replayed_as_it_was_below_every_users_class(tmp_path: Path, path: str, stream: bool) -> None:
    async def story(site: Site, http: httpx.AsyncClient) -> None:
        asked = {"temperature": 0.3, "max_tokens": 7, "user": "u", "n": 2, "priority": "interactive"}
        reply = await site.ask(http, path, stream=stream, stream_options={"include_usage": True}, **asked)
        assert reply.headers["x-umbel-adapter"] == "support@v2"
        found = await replayed(site)
        assert (found.compared, found.agreement, found.failed, found.dropped) == (1, 1.0, 0, 0)
        assert (found.words, found.live_words) == (3, 3)
        (live, _, _), (shadow, where, body) = site.chat.answered
        assert (live, shadow, where) == (LIVE, SHADOW, path)
        original = {"prompt": "hello"} if path != CHAT else {"messages": [{"role": "user", "content": "hi"}]}
        expected = {"model": "support", "temperature": 0.3, "max_tokens": 7, **original}
        assert body == {**expected, "n": 1, "stream": False, "priority": Priority.MIRROR}
        assert site.chat.keys == {f"Bearer {KEY}".encode()}
        assert site.router.in_flight.total() == 0
        assert "support@v3" not in site.router.traffic.report(), "no user was answered by it"

    run(tmp_path, story)


def test_only_requests_to_the_live_version_that_went_well_are_replayed(tmp_path: Path) -> None:
    async def story(site: Site, http: httpx.AsyncClient) -> None:
        for model in ("tiny", "support@v1", "support@live"):
            await site.ask(http, model=model)
        for path in ("/v1/responses", "/v1/messages"):
            await site.ask(http, path)
        site.chat.status[LIVE] = 500
        await site.ask(http)
        await replayed(site)
        assert [version for version, *_ in site.chat.answered].count(SHADOW) == 0

    run(tmp_path, story)


def test_a_long_request_does_not_wait_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "MAX_REQUEST_BYTES", 400)

    async def story(site: Site, http: httpx.AsyncClient) -> None:
        await site.ask(http, messages=[{"role": "user", "content": "x" * 400}])
        assert len(site.router.mirror._queue) == 0
        await site.ask(http, messages=[{"role": "user", "content": "x" * 40}])
        found = await replayed(site)
        assert (found.compared, found.dropped) == (1, 1)

    run(tmp_path, story)


def test_without_a_share_nothing_is_kept_or_replayed(tmp_path: Path) -> None:
    async def story(site: Site, http: httpx.AsyncClient) -> None:
        await site.ask(http)
        assert await replayed(site) == MirrorTraffic()
        assert len(site.chat.answered) == 1

    run(tmp_path, story, share=0.0)


def test_an_answer_that_is_too_long_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "MAX_ANSWER_BYTES", 200)

    async def story(site: Site, http: httpx.AsyncClient) -> None:
        site.chat.says = {LIVE: "word " * 50, SHADOW: "word " * 50}
        for stream in (False, True):
            await site.ask(http, stream=stream)
        assert await replayed(site) == MirrorTraffic()
        site.chat.says = {}
        await site.ask(http)
        assert (await replayed(site)).compared == 1

    run(tmp_path, story)


def test_what_the_canary_answers_is_not_mirrored(tmp_path: Path) -> None:
    async def main() -> None:
        site = Site(tmp_path, mirror={"support": 1.0}, canary={"support": 0.999999})
        async with site.open() as http:
            assert (await site.ask(http, user="u")).headers["x-umbel-adapter"] == "support@v3"
            assert await replayed(site) == MirrorTraffic()

    asyncio.run(main())


def test_one_at_a_time_and_what_finds_no_room_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "QUEUE", 2)

    async def story(site: Site, http: httpx.AsyncClient) -> None:
        site.chat.gates[SHADOW] = asyncio.Event()
        for _ in range(5):
            await site.ask(http)
            await asyncio.sleep(0)
        assert site.router.in_flight == {"support@v2": 0, "support@v3": 1}
        site.chat.gates[SHADOW].set()
        found = await replayed(site)
        assert (found.compared, found.dropped) == (3, 2)

    run(tmp_path, story)


def test_nothing_is_replayed_while_a_user_waits(tmp_path: Path) -> None:
    async def story(site: Site, http: httpx.AsyncClient) -> None:
        site.chat.gates[None] = asyncio.Event()
        waiting = asyncio.create_task(site.ask(http, model="tiny"))
        while not site.router.traffic.waiting:
            await asyncio.sleep(0)
        await site.ask(http)
        found = await replayed(site)
        assert (found.compared, found.dropped) == (0, 1)
        site.chat.gates[None].set()
        await waiting
        await site.ask(http)
        assert (await replayed(site)).compared == 1

    run(tmp_path, story)


def test_a_shadow_that_is_watched_no_more_is_given_nothing(tmp_path: Path) -> None:
    async def story(site: Site, http: httpx.AsyncClient) -> None:
        site.chat.gates[SHADOW] = asyncio.Event()
        for _ in range(3):
            await site.ask(http)
        await asyncio.sleep(0)
        site.table.model_copy(update={"mirror": {}}).write(site.file)
        await http.post("/umbel/aliases", headers=ADMIN)
        site.chat.gates[SHADOW].set()
        found = await replayed(site)
        assert (found.compared, found.dropped) == (1, 2), "the one that was under way has ended"

    run(tmp_path, story)


def test_a_site_that_stops_waits_for_no_replay(tmp_path: Path) -> None:
    async def story(site: Site, http: httpx.AsyncClient) -> None:
        site.chat.gates[SHADOW] = asyncio.Event()
        await site.ask(http)
        await asyncio.sleep(0)
        assert (await http.post("/umbel/drain", headers=ADMIN)).status_code == 200
        await replayed(site)
        assert (await http.get("/umbel/inflight", headers=ADMIN)).json() == {}

    run(tmp_path, story)


def test_a_shadow_that_fails_costs_users_nothing_and_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(site: Site, http: httpx.AsyncClient) -> None:
        site.chat.status[SHADOW] = 500
        assert (await site.ask(http)).status_code == 200
        assert (await replayed(site)).failed == 1
        site.chat.status[SHADOW] = 503
        await site.ask(http)
        found = await replayed(site)
        assert (found.failed, found.dropped) == (1, 1), "that the engine is full is no fault of the shadow's"
        site.router.mirror._replay = broken
        await site.ask(http)
        assert (await replayed(site)).failed == 2

    async def broken(*_: object) -> bytes | None:
        raise ValueError("the secret of a patient")

    with caplog.at_level(logging.DEBUG):
        run(tmp_path, story)
    assert "mirror.failed ref=support@v3 ValueError" in caplog.text
    assert "patient" not in caplog.text


def test_empty_answers_refusals_and_lengths_are_counted_for_both(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(site: Site, http: httpx.AsyncClient) -> None:
        for live, shadow in (("one two three four", "one two"), ("yes", ""), ("of course", "I’m sorry, but no")):
            site.chat.says = {LIVE: live, SHADOW: shadow}
            await site.ask(http)
            await replayed(site)
        found = await replayed(site)
        assert found == MirrorTraffic(
            compared=3, agreement=0.5, words=6, live_words=7, empty=1, live_empty=0, refusals=1, live_refusals=0
        )
        told = (await http.get("/umbel/traffic", headers=ADMIN)).text
        assert "sorry" not in told
        assert "sorry" not in caplog.text

    with caplog.at_level(logging.DEBUG):
        run(tmp_path, story)


@pytest.mark.parametrize(
    ("live", "shadow", "share"),
    [("a b c", "a b c", 1.0), ("", "", 1.0), ("a b c d", "a b x d", 0.5), ("a b", "a b c d", 0.5), ("a", "", 0.0),
     ("x a b", "a b", 0.0), ("a  b\n", "a b", 1.0)],
)  # fmt: skip
def test_agreement_is_the_share_of_equal_leading_words(live: str, shadow: str, share: float) -> None:
    assert agreement(live.split(), shadow.split()) == agreement(shadow.split(), live.split()) == share


@pytest.mark.parametrize(
    ("text", "refused"),
    [("I'm sorry, I can't help with that.", True), ("As an AI language model, I", True), ("  I CANNOT say", True),
     ("Sure. " * 20 + "I cannot", False), ("The ward is in room 7.", False), ("", False)],
)  # fmt: skip
def test_a_refusal_shows_at_its_beginning(text: str, refused: bool) -> None:
    assert refuses(text) is refused


def test_what_is_said_is_the_first_choice_with_its_tool_calls() -> None:
    calls = [{"function": {"name": "look_up", "arguments": '{"a": 1}'}}]
    whole = {"choices": [{"index": 1, "message": {"content": "second"}},
                         {"index": 0, "message": {"content": None, "tool_calls": calls}}]}  # fmt: skip
    assert said(json.dumps(whole).encode()) == 'look_up{"a": 1}'
    deltas = [
        {"tool_calls": [{"function": {"name": "look_up", "arguments": ""}}]},
        {"tool_calls": [{"function": {"arguments": '{"a": 1}'}}]},
    ]
    events = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas] + [{"choices": [], "usage": {}}]
    lines = [f"data: {json.dumps(event)}\n\n".encode() for event in events]
    assert said_in_stream([*lines, b": a comment\n\n", b"data: [DONE]\n\n"]) == 'look_up{"a": 1}'
    for nonsense in (b"", b"{", b"[]", b"{}", b'{"choices": 7}'):
        assert said(nonsense) is None
        assert said_in_stream([b"data: " + nonsense]) is None
