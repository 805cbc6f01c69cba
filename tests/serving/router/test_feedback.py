"""Ratings are counted for the version that gave the answer, whatever has been promoted since."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.router import feedback
from serving.router.feedback import Ratings
from tests.toys.chat import ADMIN, Site
from umbel.errors import NotFound

ROUTES = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"]


def run(folder: Path, story: Callable[[Site, httpx.AsyncClient], Awaitable[None]]) -> None:
    async def main() -> None:
        site = Site(folder)
        async with site.open() as http:
            await story(site, http)

    asyncio.run(main())


def counts(site: Site, label: str) -> tuple[int, int]:
    found = site.router.traffic.report()[label]
    return found.up, found.down


def identity(reply: httpx.Response) -> str:
    first = reply.text.removeprefix("data:").partition("\n\n")[0]
    return str(json.loads(first)["id"])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ROUTES)
def test_an_answer_can_be_rated_by_the_id_it_came_with(tmp_path: Path, path: str, stream: bool) -> None:
    async def story(site: Site, http: httpx.AsyncClient) -> None:
        answer = identity(await site.ask(http, path, stream=stream))
        reply = await http.post("/v1/feedback", json={"id": answer, "rating": "up"})
        assert reply.status_code == 200
        assert reply.json() == {"id": answer, "rating": "up", "umbel_adapter": "support@v2"}
        assert counts(site, "support@v2") == (1, 0)
        told = (await http.get("/umbel/traffic", headers=ADMIN)).json()["versions"]["support@v2"]
        assert (told["requests"], told["up"], told["down"]) == (1, 1, 0)

    run(tmp_path, story)


def test_a_second_rating_replaces_the_first(tmp_path: Path) -> None:
    async def story(site: Site, http: httpx.AsyncClient) -> None:
        answer = identity(await site.ask(http))
        for rating, expected in (("up", (1, 0)), ("up", (1, 0)), ("down", (0, 1)), ("up", (1, 0))):
            await http.post("/v1/feedback", json={"id": answer, "rating": rating})
            assert counts(site, "support@v2") == expected

    run(tmp_path, story)


def test_a_rating_is_of_the_version_that_answered_then(tmp_path: Path) -> None:
    async def story(site: Site, http: httpx.AsyncClient) -> None:
        answers = [identity(await site.ask(http, model=model)) for model in ("tiny", "support@v1", "support")]
        promoted = {"live": "support@v3", "previous": "support@v2", "shadow": None}
        site.table.model_copy(update={"adapters": {"support": promoted}, "addressable": ()}).write(site.file)
        await http.post("/umbel/aliases", headers=ADMIN)
        for answer in answers:
            assert (await http.post("/v1/feedback", json={"id": answer, "rating": "down"})).status_code == 200
        assert [counts(site, label) for label in ("base", "support@v1", "support@v2")] == [(0, 1)] * 3

    run(tmp_path, story)


def test_an_unknown_answer_is_404_and_nonsense_400(tmp_path: Path) -> None:
    path = "/v1/feedback"
    nonsense: list[Any] = [
        b"", b"{", b"[]", b"null", b'"up"', b"\xff", b"[" * 100_000, b" " * (feedback.MAX_BODY_BYTES + 1),
        *(json.dumps(body).encode() for body in (
            {}, {"id": "a"}, {"rating": "up"}, {"id": "", "rating": "up"}, {"id": 7, "rating": "up"},
            {"id": "a", "rating": "sideways"}, {"id": "a", "rating": "up", "text": "x"},
            {"id": "a" * 257, "rating": "up"},
        )),
    ]  # fmt: skip

    async def story(site: Site, http: httpx.AsyncClient) -> None:
        site.chat.status[None] = 500
        failed = identity(await site.ask(http, model="tiny"))
        for unknown in ("a", failed):
            reply = await http.post(path, json={"id": unknown, "rating": "up"})
            assert (reply.status_code, reply.json()["error"]["param"]) == (404, "id")
            assert repr(unknown) in reply.json()["error"]["message"]
        for body in nonsense:
            reply = await http.post(path, content=body)
            assert (reply.status_code, reply.json()["error"]["type"]) == (400, "invalid_request_error"), body[:40]
        assert (await http.get(path)).status_code == 404
        assert len(site.chat.answered) == 1, "SGLang hears nothing of it"

    run(tmp_path, story)


def test_only_the_latest_answers_are_remembered() -> None:
    ratings = Ratings(most=3)
    for number in range(5):
        ratings.remember(f"a{number}", "support@v1", user=number or None)
    assert ratings.rate("a4", "up") == ("support@v1", 4, None)
    assert ratings.rate("a4", "down") == ("support@v1", 4, "up")
    for forgotten in ("a0", "a1"):
        with pytest.raises(NotFound, match="only the latest"):
            ratings.rate(forgotten, "up")
