"""The canary: a watched shadow answers a share of the users, the same ones always, and none that has no id."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from serving.aliases import AliasTable
from serving.router.asgi import Receive, Scope, Send
from serving.router.canary import place, user_of, version_for
from serving.router.pin import apply_pin
from serving.router.router import GENERATING, Router

KEY = "k" * 64
ADMIN = {"authorization": f"Bearer {KEY}"}
USERS = [f"user-{number}" for number in range(2000)]


def table(shadow: str | None = "support@v3", live: str | None = "support@v2", **share: float) -> AliasTable:
    return AliasTable(
        base="tiny",
        adapters={"support": {"live": live, "previous": "support@v1", "shadow": shadow}},
        addressable=("support@v2", "support@v1"),
        canary=share,
    )


def after_promotion(share: float, previous: str | None = "support@v2", redraw: bool = False) -> AliasTable:
    """Version 3 has taken the place of another one, or of the base, and some users stay with that."""
    return AliasTable(
        base="tiny",
        adapters={"support": {"live": "support@v3", "previous": previous, "shadow": None}},
        addressable=("support@v3",),
        control={"support": share},
        redraw_users=redraw,
    )


def label(found: object) -> str:
    return str(found) if found else "base"


def chosen(users: list[str], table: AliasTable, model: str = "support") -> set[str]:
    """Return the users whom the shadow answers."""
    return {user for user in users if label(version_for(table, model, user)) == "support@v3"}


def test_its_share_of_the_users_is_answered_by_the_shadow() -> None:
    assert 0.08 < len(chosen(USERS, table(support=0.1))) / len(USERS) < 0.12
    assert chosen(USERS, table()) == set()


def test_a_user_stays_in_the_canary_from_version_to_version_and_when_it_grows() -> None:
    small, large = chosen(USERS, table(support=0.1)), chosen(USERS, table(support=0.3))
    assert small < large
    assert {user for user in USERS if place("support", user) < 0.1} == small, "whatever the version is"
    other = {user for user in USERS if place("triage", user) < 0.1}
    assert len(other & small) < 0.5 * len(small), "adapters have canaries of their own"


@pytest.mark.parametrize("model", ["tiny", "support@live", "support@v2", "support@v1", "support@previous"])
def test_who_asks_for_a_version_gets_it(model: str) -> None:
    everybody = table(support=0.999999)
    assert chosen(USERS[:50], everybody, model) == set()
    assert len(chosen(USERS[:50], everybody)) == 50


def test_while_the_base_answers_the_shadow_has_its_canary_too() -> None:
    first = table(live=None, support=0.5)
    found = {label(version_for(first, "support", user)) for user in USERS[:50]}
    assert found == {"base", "support@v3"}


def kept(table: AliasTable) -> set[str]:
    """Return the users who stay with what answered before."""
    return set(USERS) - chosen(USERS, table)


def test_after_a_promotion_a_share_of_the_users_stays_and_they_are_not_those_of_the_canary() -> None:
    control = kept(after_promotion(0.1))
    assert 0.08 < len(control) / len(USERS) < 0.12
    assert not control & chosen(USERS, table(support=0.9))
    assert {label(version_for(after_promotion(0.1), "support", user)) for user in control} == {"support@v2"}
    assert {label(version_for(after_promotion(0.1, None), "support", user)) for user in control} == {"base"}
    for model in ("support@live", "support@v3"):
        assert chosen(USERS, after_promotion(0.9), model) == set(USERS)


def test_users_drawn_anew_are_others_for_each_version_and_again_not_those_of_the_canary() -> None:
    canaries = [
        chosen(USERS, table(support=0.2).model_copy(update={"redraw_users": True})), chosen(USERS, table(support=0.2))
    ]  # fmt: skip
    assert all(0.17 < len(canary) / len(USERS) < 0.23 for canary in canaries)
    assert len(canaries[0] & canaries[1]) < 0.4 * len(canaries[0])
    assert not kept(after_promotion(0.2, redraw=True)) & canaries[0], "nobody goes back to the version before"


HELLO = [{"role": "system", "content": "s"}, {"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("request_", "headers", "user"),
    [
        ({"user": "u", "safety_identifier": "s"}, [(b"x-umbel-user", b"h")], "s"),
        ({"user": "u", "messages": HELLO}, [(b"x-umbel-user", b"h")], "u"),
        ({"messages": HELLO}, [(b"x-umbel-user", b"h")], "h"),
        ({"messages": HELLO}, [], "'hello'"),
        ({"messages": [*HELLO, {"role": "user", "content": "later"}]}, [], "'hello'"),
        ({"input": "hello"}, [], "'hello'"),
        ({"input": [{"role": "user", "content": "hello"}]}, [], "'hello'"),
        ({"user": "", "prompt": "hello"}, [], None),
        ({"user": 7, "messages": HELLO[:1]}, [], None),
        ({"messages": ["?", None]}, [(b"x-umbel-user", b"")], None),
        ({"messages": {"role": "user"}}, [], "{'role': 'user'}"),
    ],
)
def test_what_tells_users_apart(request_: dict[str, Any], headers: list[tuple[bytes, bytes]], user: str | None) -> None:
    assert user_of(request_, headers) == user


def test_a_request_of_nobody_in_particular_is_never_in_the_canary() -> None:
    assert label(version_for(table(support=0.999999), "support", None)) == "support@v2"
    assert label(version_for(after_promotion(0.999999), "support", None)) == "support@v3"


def test_a_lone_surrogate_is_a_user_too() -> None:
    assert 0 <= place("support", json.loads('"\\ud800"')) < 1


def test_a_canary_starts_and_stops_with_one_assignment_and_no_request_changes_its_version(tmp_path: Path) -> None:
    file = tmp_path / "aliases.json"
    table(support=0.999999).write(file)
    pins: list[str | None] = []

    async def main() -> None:
        reached, go_on = asyncio.Event(), asyncio.Event()

        async def sglang(scope: Scope, receive: Receive, send: Send) -> None:
            assert scope["path"] in GENERATING
            await receive()
            reached.set()
            await go_on.wait()
            asked = SimpleNamespace(lora_path=None, extra_key=None)
            apply_pin(None, asked)
            pins.append(asked.lora_path)
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"{}"})

        router = Router(sglang, file, KEY, 512)
        body = {"model": "support", "messages": HELLO}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(router), base_url="http://site") as http:
            first = asyncio.create_task(http.post("/v1/chat/completions", json=body))
            await reached.wait()
            assert router.in_flight == {"support@v3": 1}
            table().write(file)
            assert (await http.post("/umbel/aliases", headers=ADMIN)).json()["canary"] == {}
            second = asyncio.create_task(http.post("/v1/chat/completions", json=body))
            await asyncio.sleep(0)
            go_on.set()
            labels = [(await reply).headers["x-umbel-adapter"] for reply in (first, second)]
        assert labels == ["support@v3", "support@v2"]

    asyncio.run(main())
    assert pins == ["support-v3", "support-v2"]
