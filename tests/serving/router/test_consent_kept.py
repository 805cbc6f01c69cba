"""A user's example on its whole way: through the real router, over the control API, into the store."""

import asyncio
import json
import sqlite3
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from client.control import operator_api
from client.data import user_examples
from client.data.user_examples import ExampleStore
from client.site import Site
from serving.router.asgi import Receive, Scope, Send
from serving.router.consent import CHAT, EXAMPLES, Consent
from serving.router.pin import apply_pin
from serving.router.router import Router
from serving.user_example import SETTINGS, ConsentSettings, Example
from tests.toys.engine import site_config
from tests.toys.serving.router import KEY, TABLE, VOCAB
from umbel.site.adapter_sections import AdapterSection
from umbel.site.config import SiteConfig
from umbel.site.sections import ExamplesSection

AGREED = {"x-umbel-consent": "train"}


async def sglang(scope: Scope, receive: Receive, send: Send) -> None:
    asked = json.loads((await receive())["body"])
    apply_pin(None, SimpleNamespace(lora_path=None, extra_key=None), None)
    said = f"{asked['messages'][-1]['content']}: ward 7"
    body = {"id": "chatcmpl-1", "choices": [{"message": {"content": said}, "finish_reason": "stop"}]}
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})


@pytest.fixture
def config(tmp_path: Path) -> SiteConfig:
    TABLE.write(tmp_path / "aliases.json")
    section = ExamplesSection(enabled=True, quarantine_hours=0, per_user=1)
    config = site_config(tmp_path).model_copy(update={"examples": section})
    user_examples.prepare(config)
    return config


def users(config: SiteConfig, scrub: Any = str.upper) -> httpx.AsyncClient:
    """Return a user's client of a site with the real router and control API."""
    site: Any = SimpleNamespace(config=config, scrub=scrub)
    site.keep = partial(Site.keep, site)
    state = config.site.state_dir
    settings = ConsentSettings.model_validate_json((state / SETTINGS).read_text())
    router = Router(sglang, state / "aliases.json", KEY, VOCAB)
    app = Consent(router, settings, httpx.ASGITransport(operator_api(site)))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://site")


def ask(model: str, user: str = "eva") -> dict[str, Any]:
    return {"model": model, "user": user, "messages": [{"role": "user", "content": "where"}]}


def test_from_the_answer_to_the_training_data(config: SiteConfig) -> None:
    async def main() -> None:
        async with users(config) as client:
            for model in ("tiny", "support@previous"):
                assert (await client.post(CHAT, json=ask(model), headers=AGREED)).status_code == 200
                reply = await client.post(EXAMPLES, json={"id": "chatcmpl-1", "accept": True}, headers=AGREED)
                assert reply.status_code == 404, "only what the live version said"
            assert (await client.post(CHAT, json=ask("support"), headers=AGREED)).status_code == 200
            assert (await client.post(EXAMPLES, json={"id": "chatcmpl-1", "accept": True})).status_code == 404
            reply = await client.post(EXAMPLES, json={"id": "chatcmpl-1", "accept": True}, headers=AGREED)
            assert (reply.status_code, reply.json()["state"]) == (200, "quarantine")
            await client.post(CHAT, json=ask("support"), headers=AGREED)
            reply = await client.post(EXAMPLES, json={"id": "chatcmpl-1", "accept": True}, headers=AGREED)
            assert (reply.status_code, "of this user are kept already" in reply.text) == (409, True)

    asyncio.run(main())
    (kept,) = ExampleStore.of(config).all()
    assert (kept.adapter, kept.version) == ("support", "support@v2")
    assert kept.messages == [
        {"role": "user", "content": "WHERE"}, {"role": "assistant", "content": "WHERE: WARD 7"},
    ]  # fmt: skip
    assert user_examples.export(config, "support").file is None
    ExampleStore.of(config).release()
    assert user_examples.export(config, "support").file == config.site.state_dir / "examples" / "support.jsonl"


def test_what_the_base_said_before_a_first_version_trains_the_adapter_that_was_asked(config: SiteConfig) -> None:
    """Without a version of `support`, `x-umbel-adapter` says `base`, of which nothing is trained."""
    fresh = TABLE.model_copy(update={"adapters": {"support": {"live": None}}, "addressable": ()})
    fresh.write(config.site.state_dir / "aliases.json")

    async def main() -> None:
        async with users(config) as client:
            reply = await client.post(CHAT, json=ask("support"), headers=AGREED)
            assert (reply.status_code, reply.headers["x-umbel-adapter"]) == (200, "base")
            reply = await client.post(EXAMPLES, json={"id": "chatcmpl-1", "accept": True}, headers=AGREED)
            assert reply.json() == {"id": "chatcmpl-1", "object": "example", "state": "quarantine"}

    asyncio.run(main())
    (kept,) = ExampleStore.of(config).all()
    assert (kept.adapter, kept.version) == ("support", "base")
    ExampleStore.of(config).release()
    file = user_examples.export(config, "support").file
    assert file is not None
    assert "WARD 7" in file.read_text()


def test_what_users_of_one_adapter_gave_never_trains_another(config: SiteConfig) -> None:
    """Two adapters on one base, each with a user; each corrects an answer of theirs."""
    both = (AdapterSection(name="support"), AdapterSection(name="triage"))
    config = config.model_copy(update={"adapter": both})
    aliases = {"live": "triage@v5", "previous": None, "shadow": None}
    tenants = {"adapters": {**TABLE.adapters, "triage": aliases}, "addressable": (*TABLE.addressable, "triage@v5")}
    TABLE.model_copy(update=tenants).write(config.site.state_dir / "aliases.json")
    user_examples.prepare(config)

    async def main() -> None:
        async with users(config) as client:
            for model in ("support", "triage"):
                reply = await client.post(CHAT, json=ask(model), headers=AGREED)
                assert reply.status_code == 200
                correction = {"id": "chatcmpl-1", "correction": f"only of {model}"}
                assert (await client.post(EXAMPLES, json=correction, headers=AGREED)).status_code == 200

    asyncio.run(main())
    assert [(kept.adapter, kept.version) for kept in ExampleStore.of(config).all()] == [
        ("support", "support@v2"), ("triage", "triage@v5"),
    ]  # fmt: skip
    ExampleStore.of(config).release()
    for name in ("support", "triage"):
        file = user_examples.export(config, name).file
        assert file is not None
        (line,) = map(json.loads, file.read_text().splitlines())
        assert (line["chosen"]["content"], line["rejected"]) == (f"ONLY OF {name.upper()}", "WHERE: WARD 7")
    alone = config.model_copy(update={"adapter": both[:1]})
    user_examples.prepare(alone)
    written = [file for file in config.site.state_dir.rglob("*.jsonl") if "TRIAGE" in file.read_text()]
    assert written == [], "nothing of an adapter that the site has no more"


def test_a_site_that_keeps_nothing_says_so(config: SiteConfig) -> None:
    async def main() -> None:
        async with users(config, scrub=None) as client:
            await client.post(CHAT, json=ask("support"), headers=AGREED)
            reply = await client.post(EXAMPLES, json={"id": "chatcmpl-1", "accept": True}, headers=AGREED)
            assert (reply.status_code, "keeps no examples" in reply.text) == (404, True)

    asyncio.run(main())
    assert ExampleStore.of(config).all() == []


def test_what_is_over_its_retention_is_deleted_while_nobody_comes(
    config: SiteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ExampleStore.of(config)
    store.add(
        Example(
            user="0" * 64,
            messages=[{"role": "user", "content": "x"}],
            adapter="support",
            version="support@v2",
            kind="accepted",
        ),
        str.upper,
    )
    monkeypatch.setattr(ExampleStore.__init__, "__defaults__", (lambda: 4e9,))
    monkeypatch.setattr(user_examples, "RETENTION_CHECK_S", 0.0)

    real, tries = user_examples._purge, []

    def full_at_first(config: SiteConfig) -> None:
        tries.append(config)
        if len(tries) == 1:
            raise sqlite3.OperationalError("database or disk is full")
        real(config)

    monkeypatch.setattr(user_examples, "_purge", full_at_first)

    async def main() -> None:
        task = asyncio.create_task(user_examples.keep_retention(config))
        async with asyncio.timeout(30):
            while store.all():
                await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(main())
