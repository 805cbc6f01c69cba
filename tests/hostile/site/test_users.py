"""Hostile requests to the users' port, and SGLang's own routes, against the real router."""

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from serving.router.asgi import Message
from serving.router.router import GENERATING, OPEN, Router
from tests.toys.hostile.catalogue import Hostile
from tests.toys.hostile.requests import CHAT, OVERRULED, USERS, Request, chat
from tests.toys.serving.router import KEY, TABLE, VOCAB, Inner, send


@pytest.fixture
def inner() -> Inner:
    return Inner()


@pytest.fixture
def router(inner: Inner, tmp_path: Path) -> Router:
    TABLE.write(tmp_path / "aliases.json")
    return Router(inner, tmp_path / "aliases.json", KEY, VOCAB)


@pytest.mark.parametrize("one", USERS, ids=lambda one: one.what)
def test_a_hostile_request_is_refused_before_sglang_sees_it(router: Router, inner: Inner, one: Hostile) -> None:
    _, path, *_ = asked = one.make()
    status, body, _ = send(router, asked)
    error = json.loads(body)["error"]
    assert str(status) == one.answer
    assert re.search(one.says, error["message"]), error
    assert len(error["message"]) < 1000
    form = {"message", "type"} if path == "/v1/messages" else {"message", "type", "param", "code"}
    assert set(error) == form, "as the route's clients expect it"
    assert (inner.paths, router.in_flight.total()) == ([], 0)
    assert send(router, chat())[0] == 200, "a good one right after"


@pytest.mark.parametrize("asked", OVERRULED)
def test_what_a_request_asks_for_in_its_headers_has_no_effect(router: Router, inner: Inner, asked: Request) -> None:
    status, body, headers = send(router, asked)
    answer = json.loads(body)
    assert (status, headers["x-umbel-adapter"]) == (200, "support@v2")
    assert (answer["lora_path"], answer["extra_key"]) == ("support-v2", None)
    assert set(inner.headers) == {b"content-type", b"content-length", b"authorization"}


@pytest.mark.parametrize("path", [CHAT, "/v1/realtime", "/generate", "/metrics"])
@pytest.mark.parametrize("key", [None, f"Bearer {KEY}"])
def test_no_websocket_is_opened(router: Router, inner: Inner, path: str, key: str | None) -> None:
    sent: list[Message] = []

    async def out(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        raise AssertionError("nothing is read")

    headers = [(b"authorization", key.encode())] if key else []
    asyncio.run(router({"type": "websocket", "path": path, "headers": headers}, receive, out))
    assert sent == [{"type": "websocket.close", "code": 1008}]
    assert inner.paths == []


WALK = """
import json
from sglang.srt.entrypoints.http_server import app

def walk(routes):
    for route in routes:
        if hasattr(route, "path") and getattr(route, "methods", None):
            path = "/".join("x" if part.startswith("{") else part for part in route.path.split("/"))
            yield from ((method, path) for method in sorted(route.methods))
        else:
            included = getattr(route, "original_router", None) or getattr(route, "app", None)
            yield from walk(getattr(included, "routes", []))

print("routes:", json.dumps(list(walk(app.routes))))
"""


def everything() -> list[tuple[str, str]]:
    """Return (method, path) of every route of the installed SGLang, with a value for each of the path's parameters.

    A process of its own finds them: once SGLang is imported, transformers builds other models than before.
    """
    said = subprocess.run([sys.executable, "-c", WALK], check=True, capture_output=True, text=True).stdout
    line = next(line for line in said.splitlines() if line.startswith("routes: "))
    return [(method, path) for method, path in json.loads(line.removeprefix("routes: "))]


def test_of_all_of_sglangs_routes_only_the_users_reach_it(router: Router, inner: Inner) -> None:
    routes = everything()
    assert len(routes) > 60, "the walk has found SGLang's routes"
    assert {path for _, path in routes} >= GENERATING | {"/generate", "/load_lora_adapter", "/health", "/v1/models/x"}
    others = [("GET", "/metrics"), ("GET", "/a_route_of_the_next_release"), ("GET", "/health_of_the_next_release")]
    every = {(method, path) for _, path in routes for method in ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS")}
    for method, path in sorted({*routes, *others, *every}):
        inner.paths.clear()
        send(router, (method, path, [], [b'{"model": "tiny"}']))
        users = (method, path) in {
            ("GET", "/metrics"),
            *(("GET", one) for one in OPEN),
            *(("POST", g) for g in GENERATING),
        }
        assert bool(inner.paths) == users, (method, path)
