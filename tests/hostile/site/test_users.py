"""Hostile requests to the users' port, SGLang's own routes, and users' keys, against the real router."""

import asyncio
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

from serving.router.api_keys import ApiKeys
from serving.router.router import GENERATING, OPEN, Message, Router
from tests.serving.router.test_router import ADMIN, KEY, TABLE, Inner
from tests.toys.hostile import Hostile
from tests.toys.hostile_requests import CHAT, OVERRULED, USERS, Request, chat
from umbel import secret_file
from umbel.errors import ConfigError


@pytest.fixture
def inner() -> Inner:
    return Inner()


@pytest.fixture
def router(inner: Inner, tmp_path: Path) -> Router:
    TABLE.write(tmp_path / "aliases.json")
    return Router(inner, tmp_path / "aliases.json", KEY)


def send(router: Router, request: Request) -> tuple[int, str, dict[str, str]]:
    """Status, body and headers of the answer to one request, sent chunk by chunk."""
    method, path, headers, chunks = request
    messages: list[Message] = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    messages[-1]["more_body"] = False
    answer: list[Message] = []

    async def receive() -> Message:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def out(message: Message) -> None:
        answer.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": headers}
    asyncio.run(router(scope, receive, out))  # type: ignore[arg-type]
    told = {name.decode(): value.decode() for name, value in answer[0]["headers"]}
    return answer[0]["status"], b"".join(one.get("body", b"") for one in answer[1:]).decode(), told


@pytest.mark.parametrize("one", USERS, ids=lambda one: one.what)
def test_a_hostile_request_is_refused_before_sglang_sees_it(router: Router, inner: Inner, one: Hostile) -> None:
    status, body, _ = send(router, one.make())
    error = json.loads(body)["error"]
    assert str(status) == one.answer
    assert re.search(one.says, error["message"]), error
    assert len(error["message"]) < 1000
    assert set(error) == {"message", "type", "param", "code"}, "as OpenAI's clients expect it"
    assert (inner.paths, router.in_flight.total()) == ([], 0)
    assert send(router, chat())[0] == 200, "a good one right after"


@pytest.mark.parametrize("asked", OVERRULED)
def test_what_a_request_asks_for_beside_its_model_has_no_effect(router: Router, inner: Inner, asked: Request) -> None:
    status, body, headers = send(router, asked)
    answer = json.loads(body)
    assert (status, headers["x-umbel-adapter"]) == (200, "support@v2")
    assert (answer["lora_path"], answer["extra_key"]) == ("support-v2", None)


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
    """(method, path) of every route of the SGLang that is installed, with something in each path's parameters.

    Found in a process of its own: with SGLang imported, transformers builds other models than without.
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


KEYS = ("sk-" + "a" * 40, "sk-" + "b" * 40)
WITH_KEYS = [("POST", CHAT), ("POST", "/v1/completions"), ("POST", "/v1/responses"), ("POST", "/v1/messages"),
             ("GET", "/v1/models"), ("GET", "/v1/models/tiny"), ("GET", "/metrics")]  # fmt: skip


@pytest.fixture
def locked(inner: Inner, tmp_path: Path) -> Router:
    TABLE.write(tmp_path / "aliases.json")
    return Router(inner, tmp_path / "aliases.json", KEY, ApiKeys(KEYS))


@pytest.mark.parametrize(("method", "path"), [*WITH_KEYS, ("POST", "/generate"), ("GET", "/nothing")])
@pytest.mark.parametrize(
    "headers",
    [[], [(b"authorization", b"Bearer ")], [(b"authorization", b"Bearer " + KEYS[0][:-1].encode())],
     [(b"authorization", b"Basic " + KEYS[0].encode())], [(b"authorization", KEYS[0].encode())],
     [(b"x-api-key", b"")], [(b"x-api-key", b"\xff")], [(b"x-api-key", (KEYS[0] + KEYS[1]).encode())],
     [(b"x-api-key", b"Bearer " + KEYS[0].encode())]],
)  # fmt: skip
def test_without_a_key_nothing_but_health_answers(
    locked: Router, inner: Inner, method: str, path: str, headers: list[tuple[bytes, bytes]]
) -> None:
    status, body, _ = send(locked, (method, path, headers, [b'{"model": "tiny"}']))
    error = json.loads(body)["error"]
    assert (status, error["code"], error["type"]) == (401, "invalid_api_key", "invalid_request_error")
    assert "x-api-key: KEY" in error["message"]
    assert inner.paths == []
    for open_path in sorted(OPEN):
        assert send(locked, ("GET", open_path, [], [b""]))[0] == 200


@pytest.mark.parametrize(("method", "path"), WITH_KEYS)
@pytest.mark.parametrize(
    "header",
    [(b"authorization", b"Bearer " + KEYS[1].encode()), (b"authorization", b"bearer  " + KEYS[0].encode()),
     (b"x-api-key", KEYS[0].encode())],
)  # fmt: skip
def test_each_key_opens_the_users_routes_and_goes_no_further(
    locked: Router, inner: Inner, method: str, path: str, header: tuple[bytes, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    assert send(locked, (method, path, [header], [b'{"model": "tiny"}']))[0] == 200
    assert send(locked, ("POST", "/generate", [header], [b"{}"]))[0] == 404
    if path in GENERATING:
        assert inner.headers[b"authorization"] == ADMIN["authorization"].encode()
    assert not any(key.encode() in value for key in KEYS for value in inner.headers.values())
    assert not any(key in caplog.text for key in KEYS)


def test_the_daemon_needs_no_users_key(locked: Router) -> None:
    admin = [(b"authorization", ADMIN["authorization"].encode())]
    assert send(locked, ("POST", "/umbel/aliases", admin, [b""]))[0] == 200
    assert send(locked, ("POST", "/load_lora_adapter", admin, [b"{}"]))[0] == 200


def test_a_file_of_keys_has_comments_and_one_owner(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# eva\n{KEYS[0]}\n\n  {KEYS[1]}  \n")
    file.chmod(0o600)
    assert secret_file.read_keys(file) == KEYS
    for mode in (0o640, 0o604, 0o660):
        file.chmod(mode)
        with pytest.raises(ConfigError, match=f"others can read the API keys; chmod 600 {file}"):
            ApiKeys.read(file)


@pytest.mark.parametrize(
    ("content", "says"),
    [("", "holds no API key; write one per line"), ("# only this\n", "holds no API key"),
     ("tiny-key\n", r"line 1: shorter than 16 characters.*openssl rand"),
     (f"{KEYS[0]}\ntwo words of a key\n", "line 2: not an API key"), ("schlüssel-schlüssel", "line 1: not an API key")],
)  # fmt: skip
def test_a_file_that_holds_no_keys_says_what_to_do_and_no_key(tmp_path: Path, content: str, says: str) -> None:
    file = tmp_path / "keys"
    file.write_text(content)
    file.chmod(0o600)
    with pytest.raises(ConfigError, match=says) as error:
        ApiKeys.read(file)
    assert not any(line and line in str(error.value) for line in content.splitlines())
    with pytest.raises(ConfigError, match="none: the API keys cannot be read"):
        ApiKeys.read(tmp_path / "none")
