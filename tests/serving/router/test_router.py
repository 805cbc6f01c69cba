"""The router around a small application that treats a pinned request as SGLang's TokenizerManager would."""

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest

from serving.priorities import CLASSES, Priority
from serving.router.pin import apply_pin
from serving.router.router import GENERATING, Router
from tests.toys.serving.router import ADMIN, CHAT, KEY, TABLE, VOCAB, Inner, ask, call, generate


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/generate"), ("POST", "/load_lora_adapter"), ("GET", "/server_info"), ("GET", "/docs"), ("GET", "/"),
     ("POST", "/umbel/aliases"), ("GET", "/umbel/inflight"), ("POST", "/v1/embeddings"), ("POST", "/v1/rerank"),
     ("GET", CHAT), ("POST", CHAT + "/"), ("POST", "//v1/chat/completions"), ("POST", "/V1/chat/completions")],
)  # fmt: skip
@pytest.mark.parametrize(
    "authorization", [None, "", "Bearer ", "Bearer x", f"bearer {KEY}", KEY, f"Bearer {KEY} ", f"Bearer {KEY[:-1]}"]
)
def test_all_but_the_users_routes_are_404_without_the_key(
    router: Router, inner: Inner, method: str, path: str, authorization: str | None
) -> None:
    scope = {"type": "http", "method": method, "path": path, "headers": []}
    if authorization is not None:
        scope["headers"] = [(b"authorization", authorization.encode())]
    sent = asyncio.run(call(router, scope, [{"type": "http.request", "body": b'{"model": "tiny"}'}]))
    assert sent[0]["status"] == 404
    assert inner.paths == []


@pytest.mark.parametrize("path", ["/generate", "/load_lora_adapter", "/server_info", "/anything"])
def test_the_key_opens_every_other_route(router: Router, inner: Inner, path: str) -> None:
    assert ask(router, "POST", path, headers=ADMIN).json() == {"path": path}
    assert inner.paths == [path]


@pytest.mark.parametrize("path", ["/health", "/health_generate", "/metrics"])
def test_health_and_metrics_need_no_key(router: Router, path: str) -> None:
    assert ask(router, "GET", path).json() == {"path": path}


def test_websockets_are_closed(router: Router) -> None:
    sent = asyncio.run(call(router, {"type": "websocket", "path": CHAT, "headers": []}, []))
    assert sent == [{"type": "websocket.close", "code": 1008}]


@pytest.mark.parametrize("path", sorted(GENERATING))
@pytest.mark.parametrize(
    ("model", "engine_name", "label"),
    [("tiny", None, "base"), ("support", "support-v2", "support@v2"), ("support@live", "support-v2", "support@v2"),
     ("support@previous", "support-v1", "support@v1"), ("support@v1", "support-v1", "support@v1")],
)  # fmt: skip
def test_the_version_is_the_tables_whatever_the_body_asks_for(
    router: Router, inner: Inner, path: str, model: str, engine_name: str | None, label: str
) -> None:
    reply = generate(router, model, path)
    assert reply.json() == {
        "lora_path": engine_name, "extra_key": None, "priority": Priority.INTERACTIVE, "model": model,
    }, "`model` is never rewritten"  # fmt: skip
    assert reply.headers["x-umbel-adapter"] == label
    assert inner.headers[b"authorization"] == f"Bearer {KEY}".encode(), "SGLang answers nobody without it"
    assert router.in_flight.total() == 0


def test_a_request_of_the_daemon_itself_is_not_pinned(router: Router) -> None:
    for given, taken in ((None, Priority.INTERACTIVE), (Priority.CHECK, Priority.CHECK)):
        asked = SimpleNamespace(lora_path="support-v3", extra_key="k", priority=given)
        apply_pin(None, asked, None)
        assert vars(asked) == {"lora_path": "support-v3", "extra_key": "k", "priority": taken}


def test_the_header_is_of_what_was_applied_only(router: Router) -> None:
    reply = generate(router, "support", messages=[])
    assert reply.status_code == 400
    assert "x-umbel-adapter" not in reply.headers


@pytest.mark.parametrize(
    "model", ["suport", "support@v9", "support@shadow", "support@v3", "support@", "@live", "tiny@live"]
)
def test_an_unknown_model_is_404_and_the_known_ones_are_named(router: Router, inner: Inner, model: str) -> None:
    reply = generate(router, model)
    assert reply.status_code == 404
    error = reply.json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert f"{model!r} does not exist. Available: tiny, support, support@v2, support@v1" in error["message"]
    assert inner.paths == []


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff\xfe{}", b"[]", b'"tiny"', b"null", b"{}", b'{"model": null}', b'{"model": ["tiny"]}',
     b'{"model": {"a": 1}}', b"[" * 200_000],
)  # fmt: skip
def test_a_body_that_names_no_model_is_400(router: Router, inner: Inner, body: bytes) -> None:
    reply = ask(router, "POST", CHAT, content=body)
    assert reply.status_code == 400
    assert reply.json()["error"]["type"] == "invalid_request_error"
    assert inner.paths == []


def test_without_a_table_there_is_nobody_to_answer(inner: Inner, tmp_path: Path) -> None:
    router = Router(inner, tmp_path / "aliases.json", KEY, VOCAB)
    for reply in (generate(router, "tiny"), ask(router, "GET", "/v1/models"), ask(router, "GET", "/ready")):
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "not_ready")
        assert int(reply.headers["retry-after"]) > 0
    assert inner.paths == []
    TABLE.write(tmp_path / "aliases.json")
    assert ask(router, "POST", "/umbel/aliases", headers=ADMIN).status_code == 200
    assert ask(router, "GET", "/ready").json() == {"path": "/health"}
    assert generate(router, "tiny").status_code == 200


def test_a_draining_site_takes_no_new_requests(router: Router) -> None:
    assert ask(router, "POST", "/umbel/drain", headers=ADMIN).json() == {}
    reply = generate(router, "support")
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "2")


@pytest.mark.parametrize("damage", [b"", b"{}", b"junk"])
def test_a_table_that_cannot_be_read_leaves_the_old_one_in_place(
    router: Router, table_file: Path, damage: bytes
) -> None:
    table_file.write_bytes(damage)
    assert ask(router, "POST", "/umbel/aliases", headers=ADMIN).status_code == 500
    assert generate(router, "support").headers["x-umbel-adapter"] == "support@v2"


def test_models_lists_what_can_be_asked_for(router: Router) -> None:
    cards = {card["id"]: card for card in ask(router, "GET", "/v1/models").json()["data"]}
    names = ["tiny", "support", "support@v2", "support@v1", "support@live", "support@previous"]
    assert list(cards) == names
    assert {name: card["root"] for name, card in cards.items()} == dict(
        zip(names, ["base", *["support@v2", "support@v2", "support@v1"], "support@v2", "support@v1"], strict=True)
    )
    assert (cards["tiny"]["parent"], cards["support"]["parent"]) == (None, "tiny")
    for name in names:
        assert ask(router, "GET", f"/v1/models/{name}").json()["root"] == cards[name]["root"]
        assert generate(router, name).headers["x-umbel-adapter"] == cards[name]["root"]
    assert "support@live" in ask(router, "GET", "/v1/models/support@v3").json()["error"]["message"]
    assert ask(router, "DELETE", "/v1/models/support").status_code == 405


@pytest.mark.parametrize("path", sorted(GENERATING))
@pytest.mark.parametrize("named", ["interactive", "batch"])
def test_a_class_by_name_reaches_sglang_as_its_number_on_every_route(
    router: Router, inner: Inner, path: str, named: str
) -> None:
    reply = generate(router, "support", path, priority=named)
    assert (reply.status_code, reply.json()["priority"]) == (200, CLASSES[named])
    assert "priority" not in inner.body, "one place decides"


@pytest.mark.parametrize("path", sorted(GENERATING))
@pytest.mark.parametrize("given", [0, -100, 10**6, "-100", "mirror", True, [], {}])
def test_a_number_or_a_class_of_others_is_refused_by_name(
    router: Router, inner: Inner, path: str, given: object
) -> None:
    reply = generate(router, "support", path, priority=given)
    assert reply.status_code == 400
    assert "'priority' is " in reply.text
    assert "use 'interactive' or 'batch'" in reply.text
    assert inner.paths == []
