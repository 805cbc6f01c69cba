"""Every refusal on every route is in the form of its clients: Anthropic's on /v1/messages and below, else OpenAI's."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from serving import engine_state
from serving.engine_state import EngineState
from serving.router.api_keys import ApiKeys
from serving.router.asgi import ANTHROPIC_ERRORS, Message, Scope
from serving.router.bodies import LONG_BYTES, MAX_BODY_BYTES, Bodies
from serving.router.router import GENERATING, Router
from serving.router.suspects import RefuseSuspects
from serving.run_dir import RouterSettings
from serving.suspects import REFUSED_S, Refusals
from tests.toys.serving.router import KEY, TABLE, VOCAB, Inner, call

USER = "sk-" + "a" * 40
GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
    "/v1/completions": {"prompt": "x"},
    "/v1/responses": {"input": "x"},
    "/v1/messages": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
}


def body(path: str, **fields: Any) -> bytes:
    return json.dumps({"model": "support", **GOOD.get(path, {}), **fields}).encode()


class Always(dict[str, float]):
    """Refuses every request, whatever its digest."""

    def get(self, key: str, default: Any = None) -> float:
        return REFUSED_S


def suspecting(router: Router) -> None:
    assert isinstance(router.app, RefuseSuspects)
    router.app._refusals = router.app._refusals.model_copy(update={"until": Always()})


def forgetful(router: Router) -> None:
    router.table = None


def draining(router: Router) -> None:
    router.draining = True


def full(router: Router) -> None:
    router.bodies = Bodies(room=0, turn_s=0.01)


def impatient(router: Router) -> None:
    router.bodies = Bodies(sent_s=0.01)


def nothing(router: Router) -> None:
    """Leave the router as it is."""


Case = tuple[int, Callable[[Router], None], Callable[[str], list[bytes]], dict[str, Any]]
LONG = [bytes(LONG_BYTES + 1)]
CASES: dict[str, Case] = {  # → status, what is done to the router, the chunks of the body, changes of the request
    "no key": (401, nothing, lambda path: [body(path)], {"headers": []}),
    "another method": (404, nothing, lambda path: [], {"method": "GET"}),
    "no such model": (404, nothing, lambda path: [body(path, model="suport")], {}),
    "an unknown field": (400, nothing, lambda path: [body(path, run_code="x")], {}),
    "no JSON": (400, nothing, lambda path: [b"{"], {}),
    "no model": (400, nothing, lambda path: [b"{}"], {}),
    "what ended an engine": (400, suspecting, lambda path: [body(path)], {}),
    "too long": (413, nothing, lambda path: [bytes(MAX_BODY_BYTES), b"x"], {}),
    "too slow": (408, impatient, lambda path: [*LONG, b""], {}),
    "too many long ones": (503, full, lambda path: [*LONG, b"x"], {}),
    "not ready": (503, forgetful, lambda path: [body(path)], {}),
    "draining": (503, draining, lambda path: [body(path)], {}),
}


@pytest.fixture
def router(inner: Inner, table_file: Path, tmp_path: Path) -> Router:
    file = tmp_path / "keys"
    file.write_text(USER)
    file.chmod(0o600)
    state = EngineState.create(tmp_path / engine_state.FILE)
    inside = RefuseSuspects(inner, state, Refusals(key="ab" * 32), lambda: 0.0)
    return Router(inside, table_file, KEY, VOCAB, ApiKeys.read(RouterSettings(api_keys=file)))


def refused(router: Router, scope: Scope, chunks: list[bytes]) -> tuple[int, dict[str, Any]]:
    messages: list[Message] = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    if messages and chunks[-1]:
        messages[-1]["more_body"] = False

    async def main() -> list[Message]:
        sent: list[Message] = []

        async def receive() -> Message:
            if not messages or not messages[0]["body"]:
                await asyncio.sleep(60)  # the client sends no more
            return messages.pop(0)

        async def send(message: Message) -> None:
            sent.append(message)

        await router(scope, receive, send)
        return sent

    start, answer = asyncio.run(main())
    assert dict(start["headers"])[b"content-type"] == b"application/json"
    assert (start["status"] == 503) == (b"retry-after" in dict(start["headers"]))
    return start["status"], json.loads(answer["body"])


def require_form(path: str, status: int, said: dict[str, Any]) -> None:
    if path.startswith("/v1/messages"):
        assert said == {
            "type": "error",
            "error": {"type": ANTHROPIC_ERRORS[status], "message": said["error"]["message"]},
        }
    else:
        assert set(said) == {"error"}
        assert set(said["error"]) == {"message", "type", "param", "code"}
    assert said["error"]["message"][-1] in ".}"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("path", sorted(GENERATING))
def test_a_refusal_has_the_form_of_its_route(router: Router, path: str, case: str) -> None:
    status, prepare, chunks, changes = CASES[case]
    prepare(router)
    headers = [(b"authorization", f"Bearer {USER}".encode())]
    scope: Scope = {"type": "http", "method": "POST", "path": path, "headers": headers, **changes}
    found, said = refused(router, scope, chunks(path))
    assert found == status
    require_form(path, status, said)
    assert router.in_flight.total() == 0


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("POST", "/v1/messages/count_tokens", 404), ("GET", "/v1/messages/batches", 404), ("POST", "/v1/embeddings", 404),
     ("POST", "/generate", 404), ("POST", "/v1/feedback", 400), ("POST", "/v1/models", 405),
     ("GET", "/v1/models/suport", 404)],
)  # fmt: skip
def test_so_have_those_of_the_other_routes(router: Router, method: str, path: str, status: int) -> None:
    headers = [(b"authorization", f"Bearer {USER}".encode())]
    scope: Scope = {"type": "http", "method": method, "path": path, "headers": headers}
    found, said = refused(router, scope, [b"{}"])
    assert found == status
    require_form(path, status, said)


def test_every_route_by_which_users_get_tokens_is_walked() -> None:
    assert set(GOOD) == GENERATING
    assert TABLE.base == "tiny"


def test_a_good_request_is_answered(router: Router) -> None:
    for path in GENERATING:
        headers = [(b"authorization", f"Bearer {USER}".encode())]
        scope: Scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
        messages: list[Message] = [{"type": "http.request", "body": body(path), "more_body": False}]
        assert asyncio.run(call(router, scope, messages))[0]["status"] == 200
