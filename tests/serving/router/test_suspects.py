"""What the HTTP process notes of requests in flight, by digests, and its refusal of what ended an engine before."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from serving import engine_state
from serving.engine_state import EngineState
from serving.router.asgi import Message, Receive, Send
from serving.router.router import GENERATING, Router
from serving.router.suspects import CODE, RefuseSuspects, refuse_suspects
from serving.suspects import Refusals, Suspects
from tests.toys.serving.router import ADMIN, CHAT, KEY, VOCAB, Inner, call, generate

NOW = 1_700_000_000.0
REFUSALS = Refusals(key="ab" * 32)


@pytest.fixture
def state(tmp_path: Path) -> EngineState:
    return EngineState.create(tmp_path / engine_state.FILE)


def router(inner: Inner, state: EngineState, table_file: Path, refusals: Refusals = REFUSALS) -> Router:
    return Router(RefuseSuspects(inner, state, refusals, lambda: NOW), table_file, KEY, VOCAB)


def test_a_request_is_in_flight_while_sglang_has_it_and_answered_after(
    inner: Inner, state: EngineState, table_file: Path
) -> None:
    seen: list[list[bytes]] = []

    async def while_sglang_has_it(receive: Receive, send: Send) -> None:
        seen.append(state.in_flight())

    inner.before = while_sglang_has_it
    assert generate(router(inner, state, table_file), "support").status_code == 200
    assert [len(one) for one in seen] == [1]
    assert state.in_flight() == []
    assert state.answered() == set(seen[0])


def test_every_route_by_which_users_get_tokens_is_noted(inner: Inner, state: EngineState, table_file: Path) -> None:
    for path in sorted(GENERATING):
        assert generate(router(inner, state, table_file), "support", path).status_code == 200
    assert len(state.answered()) == len(GENERATING)


def test_the_daemons_own_requests_are_not_noted(inner: Inner, state: EngineState, table_file: Path) -> None:
    scope: dict[str, Any] = {
        "type": "http", "method": "POST", "path": "/generate",
        "headers": [(b"authorization", ADMIN["authorization"].encode())],
    }  # fmt: skip
    asyncio.run(call(router(inner, state, table_file), scope, [{"type": "http.request", "body": b"{}"}]))
    assert inner.paths == ["/generate"]
    assert (state.in_flight(), state.answered()) == ([], set())


@pytest.mark.parametrize("how", ["refused by SGLang", "broken off", "left by its client"])
def test_what_was_not_answered_to_its_end_clears_no_request(
    inner: Inner, state: EngineState, table_file: Path, how: str
) -> None:
    async def break_off() -> None:
        raise RuntimeError("broken off")

    async def leave(receive: Receive, send: Send) -> None:
        watched["receive"] = receive

    async def notice() -> None:
        await watched["receive"]()

    watched: dict[str, Receive] = {}
    body: dict[str, Any] = {"model": "support"}
    if how == "refused by SGLang":
        body["messages"] = []
    elif how == "broken off":
        inner.after = break_off
    else:
        inner.before, inner.after = leave, notice
    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": CHAT, "headers": []}
    messages: list[Message] = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
    try:
        asyncio.run(call(router(inner, state, table_file), scope, messages))
    except RuntimeError as error:
        assert how == str(error)  # noqa: PT017 - the others end without one
    assert len(state.in_flight()) == (how == "left by its client"), "the engine may hang in it all the same"
    for _ in range(engine_state.PASSED):
        state.count_batch()
    state.count_output()
    assert (state.in_flight(), state.answered()) == ([], set())


def test_the_request_that_ended_an_engine_is_refused_until_its_time_and_others_are_not(
    inner: Inner, state: EngineState, table_file: Path
) -> None:
    begun: list[bytes] = []

    async def note(receive: Receive, send: Send) -> None:
        begun.extend(state.in_flight())

    inner.before = note
    generate(router(inner, state, table_file), "support", max_tokens=7)
    asked = len(inner.paths)
    refusals = Refusals(key=REFUSALS.key, until={begun[0].hex(): NOW + 60})
    again = generate(router(inner, state, table_file, refusals), "support", max_tokens=7)
    assert again.status_code == 400
    assert again.json()["error"]["code"] == CODE
    assert "not answered again until 22:14:20 UTC" in again.json()["error"]["message"]
    assert len(inner.paths) == asked, "SGLang has not seen it"
    assert generate(router(inner, state, table_file, refusals), "support", max_tokens=8).status_code == 200
    late = Refusals(key=REFUSALS.key, until={begun[0].hex(): NOW})
    assert generate(router(inner, state, table_file, late), "support", max_tokens=7).status_code == 200


def test_without_a_daemon_sglang_is_left_as_it_is(inner: Inner, tmp_path: Path) -> None:
    assert refuse_suspects(inner, tmp_path) is inner
    EngineState.create(tmp_path / engine_state.FILE)
    Suspects().write(tmp_path, NOW)
    assert isinstance(refuse_suspects(inner, tmp_path), RefuseSuspects)
