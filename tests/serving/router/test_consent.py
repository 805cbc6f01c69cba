"""Consent: answers are remembered only with the header, handed over only when accepted, and passed on unchanged."""

import asyncio
import hashlib
import hmac
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.router import consent
from serving.router.api_keys import ApiKeys
from serving.router.asgi import Receive, Scope, Send
from serving.router.consent import CHAT, EXAMPLES, Consent, with_consent
from serving.user_example import MAX_EXAMPLE_BYTES, SETTINGS, ConsentSettings

KEY = "ab" * 32
AGREED = {"x-umbel-consent": "train"}
REQUEST: dict[str, Any] = {
    "model": "support", "user": "eva", "messages": [{"role": "user", "content": "Which ward?"}],
}  # fmt: skip
MODELS = {"support": "support", "tiny:support": "support", "triage": "triage"}
SETTINGS_OF_BOTH = ConsentSettings(key=KEY, socket=Path("/nowhere"), models=MODELS)
ANSWER: dict[str, Any] = {
    "id": "chatcmpl-1",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Ward 7."}, "finish_reason": "stop"}],
}


class Inner:
    """Stands for the router; tests choose its answers."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.status = 200
        self.kind = b"application/json"
        self.version: bytes | None = b"support@v3"
        self.chunks = [json.dumps(ANSWER).encode()]

    def streams(self, *deltas: str, finish: str = "stop") -> None:
        self.kind = b"text/event-stream"
        parts = [{"id": "chatcmpl-1", "choices": [{"delta": {"content": text}}]} for text in deltas]
        parts.append({"id": "chatcmpl-1", "choices": [{"delta": {}, "finish_reason": finish}]})
        text = "".join(f"data: {json.dumps(part)}\n\n" for part in parts) + "data: [DONE]\n\n"
        self.chunks = [text[at : at + 7].encode() for at in range(0, len(text), 7)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.bodies.append((await receive())["body"])
        version = [(b"x-umbel-adapter", self.version)] if self.version else []
        headers = [(b"content-type", self.kind), *version]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        for chunk in self.chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


class Daemon(httpx.AsyncBaseTransport):
    def __init__(self) -> None:
        self.kept: list[dict[str, Any]] = []
        self.refuses: httpx.Response | Exception | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        assert request.url.path == "/examples"
        if isinstance(self.refuses, Exception):
            raise self.refuses
        if self.refuses is not None:
            return self.refuses
        self.kept.append(json.loads(await request.aread()))
        return httpx.Response(200, json={"id": len(self.kept)})


class Site:
    def __init__(self, keys: ApiKeys | None = None) -> None:
        self.inner, self.daemon, self.now = Inner(), Daemon(), 0.0
        self.app = Consent(self.inner, SETTINGS_OF_BOTH, self.daemon, clock=lambda: self.now, keys=keys)

    def post(self, path: str, body: object, headers: dict[str, str] | None = None) -> httpx.Response:
        async def asked() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://site") as client:
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                return await client.post(path, content=content, headers=AGREED if headers is None else headers)

        return asyncio.run(asked())

    def ask(self, headers: dict[str, str] | None = None, **changes: Any) -> httpx.Response:
        return self.post(CHAT, {**REQUEST, **changes}, headers)

    def accept(self, answer: str = "chatcmpl-1", headers: dict[str, str] | None = None, **said: Any) -> httpx.Response:
        return self.post(EXAMPLES, {"id": answer, **(said or {"accept": True})}, headers)


@pytest.fixture
def site() -> Site:
    return Site()


def test_an_accepted_answer_is_handed_over_with_its_prompt_and_its_users_pseudonym(site: Site) -> None:
    reply = site.ask()
    assert (reply.content, reply.headers["x-umbel-adapter"]) == (site.inner.chunks[0], "support@v3")
    assert site.daemon.kept == [], "nothing before the user says so"
    said = site.accept()
    assert (said.status_code, said.json()["state"]) == (200, "quarantine")
    assert site.daemon.kept == [
        {
            "user": hmac.new(bytes.fromhex(KEY), b"eva", hashlib.sha256).hexdigest(),
            "messages": [*REQUEST["messages"], {"role": "assistant", "content": "Ward 7."}],
            "adapter": "support",
            "version": "support@v3",
            "kind": "accepted",
        }
    ]
    assert site.accept().status_code == 404, "once"
    assert site.inner.bodies == [json.dumps(REQUEST).encode()], "the router never sees an example"


def test_a_streamed_answer_passes_unchanged_and_a_correction_takes_its_place(site: Site) -> None:
    site.inner.streams("Ward", " 7", ".")
    assert site.ask(stream=True).content == b"".join(site.inner.chunks)
    assert site.accept(correction="Ward 8.").status_code == 200
    (kept,) = site.daemon.kept
    assert kept["kind"] == "corrected"
    assert kept["messages"][-1] == {"role": "assistant", "content": "Ward 8."}
    assert kept["rejected"] == "Ward 7.", "what is corrected is the worse one"
    site.inner.streams("Ward", " 9")
    site.ask(stream=True)
    site.accept()
    assert site.daemon.kept[1]["messages"][-1]["content"] == "Ward 9"


def test_an_example_is_of_the_adapter_that_was_asked_for_by_any_of_its_names(site: Site) -> None:
    site.inner.version = b"base"
    for number, model in enumerate(MODELS):
        site.inner.chunks = [json.dumps({**ANSWER, "id": str(number)}).encode()]
        site.ask(model=model)
        assert site.accept(str(number)).status_code == 200
    assert [(kept["adapter"], kept["version"]) for kept in site.daemon.kept] == [
        ("support", "base"), ("support", "base"), ("triage", "base"),
    ]  # fmt: skip


def test_a_key_that_does_not_open_an_adapter_neither_takes_nor_spoils_its_answers() -> None:
    keys = {name: f"sk-{name}-0123456789" for name in ("support", "triage")}
    site = Site(ApiKeys(adapters={name: [key] for name, key in keys.items()}))
    own, other = ({**AGREED, "authorization": f"Bearer {keys[name]}"} for name in ("support", "triage"))
    assert site.ask(own).status_code == 200
    refused, unknown = (site.accept(answer, other) for answer in ("chatcmpl-1", "chatcmpl-2"))
    assert (refused.status_code, refused.text) == (404, unknown.text.replace("chatcmpl-2", "chatcmpl-1"))
    assert site.accept(headers=other, correction="mine now").status_code == 404
    assert site.daemon.kept == []
    assert site.accept(headers=own).status_code == 200, "it can still be accepted"
    assert [kept["adapter"] for kept in site.daemon.kept] == ["support"]


@pytest.mark.parametrize("headers", [{}, {"x-umbel-consent": "no"}, {"x-umbel-consent": "Train"}])
def test_without_consent_nothing_is_looked_at(site: Site, headers: dict[str, str]) -> None:
    site.ask(headers)
    assert site.accept().status_code == 404
    site.ask()
    site.accept(headers=headers)
    assert len(site.inner.bodies) == 3, "an example without the header is the router's to refuse"
    assert site.daemon.kept == []


@pytest.mark.parametrize(
    "changes",
    [
        {"user": None}, {"user": ""}, {"user": 7}, {"model": "tiny"}, {"model": "support@previous"},
        {"model": ["support"]}, {"n": 2}, {"messages": []}, {"messages": "x"}, {"tools": [{"type": "function"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        {"messages": [{"role": "user", "content": "x", "name": "eva"}]},
        {"messages": [{"role": "user", "content": "x\x1b[1K"}]}, {"messages": [{"role": "root", "content": "x"}]},
        {"messages": [{"role": "user", "content": "x" * MAX_EXAMPLE_BYTES}]}, {"user": "eva\ud800"},
        {"messages": [{"role": "user", "content": "\ud800"}]},
    ],
)  # fmt: skip
def test_what_cannot_be_an_example_is_answered_and_not_remembered(site: Site, changes: dict[str, Any]) -> None:
    assert site.ask(**changes).content == site.inner.chunks[0]
    assert site.accept().status_code == 404


def test_only_a_whole_good_answer_of_a_version_is_remembered(site: Site) -> None:
    def forgotten() -> bool:
        site.ask()
        return site.accept().status_code == 404

    site.inner.status = 400
    assert forgotten()
    site.inner.status, site.inner.version = 200, None
    assert forgotten()
    site.inner.version = b"support@v3"
    for message, finish in (("cut", "length"), (" ", "stop"), (None, "stop")):
        choice = {"message": {"content": message}, "finish_reason": finish}
        site.inner.chunks = [json.dumps({"id": "chatcmpl-1", "choices": [choice]}).encode()]
        assert forgotten()
    choice = {"message": {"content": "x", "tool_calls": [{}]}, "finish_reason": "stop"}
    site.inner.chunks = [json.dumps({"id": "chatcmpl-1", "choices": [choice]}).encode()]
    assert forgotten()
    site.inner.chunks = [b"no JSON"]
    assert forgotten()
    site.inner.streams("cut", finish="length")
    assert forgotten()
    site.inner.streams("x" * (consent.MAX_BYTES + 1))
    assert forgotten()


def test_bodies_that_are_no_request_are_left_to_the_router(site: Site) -> None:
    for body in (b"", b"{", b"[]", b"x" * (consent.MAX_BYTES + 1)):
        site.post(CHAT, body)
    assert [len(body) for body in site.inner.bodies] == [0, 1, 2, consent.MAX_BYTES + 1]


def answer(site: Site, name: str, text: str, **changes: Any) -> None:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    site.inner.chunks = [json.dumps({"id": name, "choices": [choice]}).encode()]
    assert site.ask(**changes).status_code == 200


def test_an_answer_is_accepted_instead_of_a_worse_one_to_the_same_prompt(site: Site) -> None:
    answer(site, "first", "No idea.")
    answer(site, "again", "Ward 7.")
    assert site.accept("again", accept=True, instead_of="first").status_code == 200
    (kept,) = site.daemon.kept
    assert (kept["kind"], kept["messages"][-1]["content"], kept["rejected"]) == ("accepted", "Ward 7.", "No idea.")
    assert [site.accept(name).status_code for name in ("first", "again")] == [404, 404], "both are given"


def test_a_correction_that_says_the_same_is_no_pair(site: Site) -> None:
    site.ask()
    assert site.accept(correction="Ward 7.").status_code == 200
    assert "rejected" not in site.daemon.kept[0]


@pytest.mark.parametrize(
    "other",
    [{"user": "ada"}, {"model": "triage"}, {"messages": [{"role": "user", "content": "Which floor?"}]}],
    ids=["user", "adapter", "prompt"],
)
def test_answers_are_compared_for_one_prompt_of_one_user_and_adapter(site: Site, other: dict[str, Any]) -> None:
    site.inner.version = b"base"
    answer(site, "first", "No idea.", **other)
    answer(site, "again", "Ward 7.")
    refused = site.accept("again", accept=True, instead_of="first")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "instead_of")
    assert "No idea" not in refused.text
    assert site.accept("again", accept=True, instead_of="never").status_code == 404
    assert site.daemon.kept == []
    assert site.accept("again").status_code == 200, "it can still be accepted alone"


def test_both_answers_together_are_bounded(site: Site) -> None:
    answer(site, "first", "x" * (MAX_EXAMPLE_BYTES - 20))
    answer(site, "again", "Ward 7." * 20)
    refused = site.accept("again", accept=True, instead_of="first")
    assert (refused.status_code, "64 KiB" in refused.text) == (400, True)


@pytest.mark.parametrize(
    "said",
    [
        {"accept": False}, {"accept": True, "correction": "x"}, {"correction": " "}, {"id": ""},
        {"accept": True, "x": 1}, {"correction": "x", "instead_of": "chatcmpl-0"}, {"instead_of": "chatcmpl-0"},
        {"accept": True, "instead_of": "chatcmpl-1"},
    ],
)  # fmt: skip
def test_an_offer_that_says_nothing_clear_is_refused_without_a_word_of_it(site: Site, said: dict[str, Any]) -> None:
    site.ask()
    reply = site.post(EXAMPLES, {"id": "chatcmpl-1", **said, "secret": "confidential"})
    assert reply.status_code == 400
    assert "confidential" not in reply.text
    assert site.accept().status_code == 200, "the answer can still be accepted"


def test_a_correction_is_bounded_in_bytes_and_holds_no_control_characters(site: Site) -> None:
    site.ask()
    long = site.accept(correction="ß" * (MAX_EXAMPLE_BYTES // 2))
    assert (long.status_code, long.json()["error"]["param"]) == (400, "correction")
    assert f"not 1 to {MAX_EXAMPLE_BYTES} (64 KiB)" in long.json()["error"]["message"]
    hidden = site.accept(correction="secret\x1b[1K")
    assert (hidden.status_code, "U+001B" in hidden.text, "secret" in hidden.text) == (400, True, False)
    assert site.daemon.kept == []
    assert site.accept(correction="Ward\t7\nor 8 🙂").status_code == 200, "the answer can still be corrected"


def test_an_answer_that_is_too_much_or_hides_something_is_not_remembered(site: Site) -> None:
    for said in ("x" * MAX_EXAMPLE_BYTES, "Ward\x1b[1K 7"):
        choice = {"message": {"content": said}, "finish_reason": "stop"}
        site.inner.chunks = [json.dumps({"id": "chatcmpl-1", "choices": [choice]}).encode()]
        assert site.ask().status_code == 200
        refused = site.accept()
        assert (refused.status_code, "64 KiB of text without control characters" in refused.text) == (404, True)


def test_what_the_daemon_refuses_can_be_offered_again(site: Site) -> None:
    site.ask()
    site.daemon.refuses = httpx.ConnectError("no daemon")
    assert site.accept().status_code == 503
    site.daemon.refuses = httpx.Response(409, json={"error": {"message": "100 are kept already"}})
    assert (site.accept().status_code, "100 are kept" in site.accept().text) == (409, True)
    site.daemon.refuses = None
    assert site.accept().status_code == 200


def test_only_the_last_answers_are_remembered_and_not_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consent, "MAX_ANSWERS", 2)
    site = Site()
    for number in (1, 2, 3):
        site.inner.chunks = [json.dumps({**ANSWER, "id": str(number)}).encode()]
        site.ask()
    assert site.accept("1").status_code == 404
    assert site.accept("2").status_code == 200
    site.now += consent.ANSWER_TTL_S + 1
    assert site.accept("3").status_code == 404


def test_a_busy_adapter_does_not_push_out_what_another_ones_users_may_accept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consent, "MAX_ANSWERS", 3)
    site = Site()
    site.inner.version = b"base"
    for number, model in enumerate(("triage", *["support"] * 7)):
        site.inner.chunks = [json.dumps({**ANSWER, "id": str(number)}).encode()]
        site.ask(model=model)
    assert [site.accept(str(number)).status_code for number in range(8)] == [200, *[404] * 5, 200, 200]
    assert [kept["adapter"] for kept in site.daemon.kept] == ["triage", "support", "support"]


def test_an_answer_that_is_being_handed_over_is_not_taken_twice(site: Site) -> None:
    site.ask()

    async def both() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(site.app), base_url="http://site") as client:
            said = {"id": "chatcmpl-1", "accept": True}
            asked = (client.post(EXAMPLES, json=said, headers=AGREED) for _ in range(2))
            return sorted(reply.status_code for reply in await asyncio.gather(*asked))

    assert asyncio.run(both()) == [200, 404]
    assert len(site.daemon.kept) == 1


def test_without_the_daemons_settings_it_is_not_there_at_all(tmp_path: Path) -> None:
    inner = Inner()
    assert with_consent(inner, tmp_path) is inner
    (tmp_path / SETTINGS).write_text(SETTINGS_OF_BOTH.model_dump_json())
    assert isinstance(with_consent(inner, tmp_path), Consent)
