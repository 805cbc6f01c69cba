"""Hostile adapters, manifests, requests and orders against the control API of a site that trusts a key."""

import base64
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.adapter_bodies import AdapterBodies
from client.control import group_api
from tests.toys.deployment import Deployment, adapter, manifest_of, quick, run
from tests.toys.engine import ToyMachine
from tests.toys.hostile import catalogue
from tests.toys.hostile.catalogue import ADAPTERS, MANIFESTS, Hostile
from tests.toys.hostile.requests import CONTROL
from tests.toys.hostile.sites import ORDERS
from umbel import peft_dir, signing
from umbel.adapter import AdapterManifest

KEY, OTHER = (Ed25519PrivateKey.from_private_bytes(bytes([byte] * 32)) for byte in (1, 2))


def client(site: Deployment) -> httpx.AsyncClient:
    """Return a client of the real control API, which raises any exception that the API does not answer."""
    hello = SimpleNamespace(adapter="support")
    whole: Any = SimpleNamespace(
        config=site.config,
        tenant=site.tenant,
        tenants=site.config.adapters,
        live=lambda adapter: None,
        hello=lambda adapter: hello,
        keys=site.deployer._keys,
        bodies=AdapterBodies(1 << 25),
    )
    return httpx.AsyncClient(transport=httpx.ASGITransport(group_api(whole)), base_url="http://site")


def sign(key: Ed25519PrivateKey, fields: dict[str, Any]) -> str:
    return signing.sign(key, AdapterManifest(**fields))


async def push(http: httpx.AsyncClient, fields: object, signature: str, blob: bytes) -> httpx.Response:
    """Push a version with anything as its manifest."""
    text = fields if isinstance(fields, str) else json.dumps(fields)
    headers = {"x-umbel-manifest": base64.b64encode(text.encode()).decode(), "x-umbel-signature": signature}
    return await http.post("/adapters/support/shadow", content=blob, headers=headers)


def good(version: int = 1) -> tuple[dict[str, Any], bytes]:
    blob = adapter(version)
    return json.loads(manifest_of(version, blob).model_dump_json()), blob


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> ToyMachine:
    made = ToyMachine()
    quick(monkeypatch, made)
    return made


def refused(reply: httpx.Response, one: Hostile, status: str) -> None:
    error = reply.json()["error"]
    assert re.fullmatch(status, str(reply.status_code)), reply.text
    assert re.search(one.says, error["message"], re.DOTALL), error
    assert len(error["message"]) < 2100


async def takes_a_good_one(site: Deployment, http: httpx.AsyncClient) -> None:
    fields, blob = good()
    assert (await push(http, fields, sign(KEY, fields), blob)).status_code == 200
    await site.judged(manifest_of(1, blob).ref)
    async with site.http(operator=True) as operator:
        assert (await operator.post("/adapters/support@v1/promote?forced=true")).json()["state"] == "live"


def stored(site: Deployment) -> list[Path]:
    return list((site.config.site.state_dir / "adapters").rglob("*"))


def trusting(site: Deployment) -> None:
    site.deployer._keys._trusted = KEY.public_key()


@pytest.mark.parametrize("one", ADAPTERS, ids=lambda one: one.what)
def test_a_hostile_adapter_is_refused_and_not_stored(tmp_path: Path, machine: ToyMachine, one: Hostile) -> None:
    async def story(site: Deployment) -> None:
        blob = one.make(catalogue.good())
        fields = {**good()[0], "digest": peft_dir.digest(blob)}
        async with client(site) as http:
            reply = await push(http, fields, sign(KEY, fields), blob)
            assert reply.json()["error"]["type"] == one.answer
            refused(reply, one, "422")
            assert (stored(site), site.journal.versions()) == ([], [])
            await takes_a_good_one(site, http)

    run(tmp_path, machine, story)


@pytest.mark.parametrize("one", MANIFESTS, ids=lambda one: one.what)
def test_a_hostile_manifest_is_refused_and_nothing_stored(tmp_path: Path, machine: ToyMachine, one: Hostile) -> None:
    async def story(site: Deployment) -> None:
        trusting(site)
        fields, blob = good()
        told, signature = one.make(fields, lambda m: sign(KEY, m), lambda m: sign(OTHER, m))
        async with client(site) as http:
            reply = await push(http, told, signature, blob)
            assert reply.json()["error"]["type"] == one.answer
            refused(reply, one, "422")
            assert (stored(site), site.journal.versions()) == ([], [])
            await takes_a_good_one(site, http)

    run(tmp_path, machine, story)


@pytest.mark.parametrize("one", CONTROL, ids=lambda one: one.what)
def test_a_hostile_request_is_refused(tmp_path: Path, machine: ToyMachine, one: Hostile) -> None:
    async def story(site: Deployment) -> None:
        method, path, headers, chunks = one.make()
        async with client(site) as http:
            refused(await http.request(method, path, headers=headers, content=b"".join(chunks)), one, one.answer)
            assert (stored(site), site.journal.versions()) == ([], [])
            await takes_a_good_one(site, http)

    run(tmp_path, machine, story)


@pytest.mark.parametrize("one", ORDERS, ids=lambda one: one.what)
def test_messages_in_another_order_change_nothing_else(tmp_path: Path, machine: ToyMachine, one: Hostile) -> None:
    async def story(site: Deployment) -> None:
        async with client(site) as http:
            await takes_a_good_one(site, http)
            fields, blob = good(2)
            await push(http, fields, sign(KEY, fields), blob)
            await site.judged(manifest_of(2, blob).ref)
            *before, last = one.make()
            for method, path in before:
                assert (await http.request(method, path)).status_code == 200
            reply = await http.request(*last)
            assert re.fullmatch(one.answer, str(reply.status_code)), reply.text
            assert re.search(one.says, reply.text), reply.text
            assert site.engine.answers("support") == "support@v1"
            assert (await http.post("/adapters/support/rollback")).status_code == 200, "it goes on"

    run(tmp_path, machine, story)
