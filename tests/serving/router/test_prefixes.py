"""Beginnings of conversations: they are counted, and a version computes the most used ones before it answers users."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.priorities import Priority
from serving.router import prefixes
from serving.router.prefixes import Prefixes
from tests.toys.chat import ADMIN, CHAT, Site

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"z": 1, "a": 2}}}]
USER = {"role": "user", "content": "hello"}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def test_the_most_used_come_first_and_none_that_was_used_once() -> None:
    counted = Prefixes()
    for text, times in (("rare", 2), ("common", 5), ("once", 1)):
        for _ in range(times):
            counted.count("support", {"messages": [system(text), USER], "temperature": 0})
    assert [body["messages"][0]["content"] for body in counted.top("support", 8)] == ["common", "rare"]
    assert len(counted.top("support", 1)) == 1
    assert counted.top("triage", 8) == []


def test_a_beginning_is_what_templates_write_before_the_conversation() -> None:
    counted = Prefixes()
    request = {"messages": [system("a"), {"role": "developer", "content": "b"}, USER, system("c")], "tools": TOOLS}
    for _ in range(2):
        counted.count("support", request)
    (body,) = counted.top("support", 8)
    assert body == {"messages": [*request["messages"][:2], prefixes.AFTER], "tools": TOOLS, "max_tokens": 1}
    assert list(body["tools"][0]["function"]["parameters"]) == ["z", "a"], "another order would be another prompt"


@pytest.mark.parametrize(
    "request_",
    [{}, {"messages": [USER]}, {"messages": "?"}, {"messages": []}, {"messages": [7, USER]}, {"prompt": "x"},
     {"messages": [USER, system("late")]}, {"messages": [system("x" * prefixes.MAX_BYTES), USER]}],
)  # fmt: skip
def test_what_nobody_shares_is_not_counted(request_: dict[str, Any]) -> None:
    counted = Prefixes()
    for _ in range(3):
        counted.count("support", request_)
    assert counted.top("support", 8) == []


def test_only_so_many_are_remembered_the_least_used_lately_goes() -> None:
    counted = Prefixes(most=2)
    for text in ("a", "a", "b", "b", "a", "c", "c"):
        counted.count("support", {"messages": [system(text)]})
    assert [body["messages"][0]["content"] for body in counted.top("support", 8)] == ["a", "c"]


def test_all_adapters_together_hold_so_many_bytes_and_the_one_with_the_most_forgets_first() -> None:
    texts = {name: [f"{name}{number:03}" for number in range(size)] for name, size in (("quiet", 2), ("busy", 90))}
    one = len(prefixes.beginning_of({"messages": [system("busy000")]}) or "")
    counted = Prefixes(room=20 * one)
    for name in ("quiet", "busy", "other"):
        for text in texts.get(name, ["other"]) * 2:
            counted.count(name, {"messages": [system(text)]})
    assert sum(len(text) for of in counted._counts.values() for text in of) <= 20 * one
    kept = [body["messages"][0]["content"] for body in counted.top("quiet", 8)]
    assert kept == texts["quiet"]
    assert counted.top("other", 8)
    assert list(counted._counts["busy"]) == [prefixes.beginning_of({"messages": [system(text)]}) for text in
                                             texts["busy"][-len(counted._counts["busy"]):]]  # fmt: skip


def test_a_version_is_given_them_below_every_users_class(tmp_path: Path) -> None:
    async def main() -> None:
        site = Site(tmp_path)
        async with site.open() as http:
            for text in ("often", "often", "often", "sometimes", "sometimes", "once"):
                await site.ask(http, messages=[system(text), USER], user="u", temperature=0.5)
            await site.ask(http, "/v1/messages", tools=TOOLS)
            await site.ask(http, "/v1/messages", tools=TOOLS)
            users = len(site.chat.answered)
            assert await prefill(http, "support@v3") == {"prefilled": 2}
            own = site.chat.answered[users:]
            assert [(version, path) for version, path, _ in own] == [("support-v3", CHAT)] * 2
            for (_, _, body), text in zip(own, ("often", "sometimes"), strict=True):
                expected = {"messages": [system(text), prefixes.AFTER], "max_tokens": 1, "model": "support"}
                assert body == {**expected, "priority": Priority.MIRROR}
            assert await prefill(http, "support@v3", most=1) == {"prefilled": 1}
            site.chat.status["support-v3"] = 500
            assert await prefill(http, "support@v3") == {"prefilled": 0}
            assert (await http.post("/umbel/prefill", json={})).status_code == 404, "not for users"
            assert site.router.in_flight.total() == 0
            assert set(site.router.traffic.report()) == {"support@v2"}

    asyncio.run(main())


def test_it_takes_no_longer_than_it_may(tmp_path: Path) -> None:
    async def main() -> None:
        site = Site(tmp_path)
        async with asyncio.timeout(20), site.open() as http:
            for _ in range(2):
                await site.ask(http, messages=[system("s"), USER])
            site.chat.gates["support-v3"] = asyncio.Event()
            assert await prefill(http, "support@v3", seconds=0.01) == {"prefilled": 0}
            assert site.router.in_flight.total() == 0

    asyncio.run(main())


async def prefill(http: httpx.AsyncClient, version: str, most: int = 8, seconds: float = 10.0) -> object:
    asked = {"version": version, "most": most, "seconds": seconds}
    return (await http.post("/umbel/prefill", json=asked, headers=ADMIN)).json()
