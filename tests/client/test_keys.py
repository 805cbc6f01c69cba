"""The keys at a site: it takes what the centre signed and nothing else, and signs what it trained, says and judged."""

import asyncio
import base64
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from client.adapter_bodies import AdapterBodies
from client.control import group_api
from client.keys import SiteKeys
from tests.toys import cotrainer as toy_cotrainer
from tests.toys.cotrainer import PARENT, Queue, Run, ToyCoTrainer, order, runner
from tests.toys.deployment import BASE, SHAPES, adapter, manifest_of
from tests.toys.engine import site_config
from umbel import signing
from umbel.adapter import Lifecycle
from umbel.errors import AdapterError, ConfigError, NotFound
from umbel.messages import Hello, JobState, RoundReport, ShadowReport, Submit
from umbel.site.config import SiteConfig
from umbel.site.sections import SiteSection
from umbel.statements import HelloStatement, UpdateStatement, VerdictStatement

CENTRE, SITE, OTHER = (Ed25519PrivateKey.from_private_bytes(bytes([n] * 32)) for n in (1, 2, 3))


def write_keys(folder: Path) -> dict[str, Path]:
    """Write both keys; return the settings of `[site]` that name them."""
    trusted, own = folder / "centre-signing.pub", folder / "updates.key"
    trusted.write_bytes(CENTRE.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    own.write_bytes(SITE.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    own.chmod(0o600)
    return {"trusted_key": trusted, "signing_key": own}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Daemons that trust CENTRE and sign as SITE."""
    keys = write_keys(tmp_path)

    def keyed(state_dir: Path) -> SiteConfig:
        config = site_config(state_dir)
        return config.model_copy(update={"site": config.site.model_copy(update=keys)})

    monkeypatch.setattr(toy_cotrainer, "site_config", keyed)
    return runner(tmp_path, ToyCoTrainer(), monkeypatch)


def signature(key: str, by: Ed25519PrivateKey = CENTRE, adapter: str = "support", **changes: Any) -> str:
    return signing.sign(by, Submit(adapter=adapter, order=order(key, **changes)))


@pytest.mark.parametrize(
    ("signed", "why"),
    [
        ("", "round r1: it is not signed; the centre signs with `signing-key`"),
        ("nonsense", "round r1: its signature is not by the trusted key, or the order was changed"),
        (signature("r1", by=OTHER), "round r1: its signature is not by the trusted key"),
        (signature("r1", plan={"steps": 400}), "round r1: its signature is not by the trusted key"),
        (signature("r1", parent=b"other"), "round r1: its signature is not by the trusted key"),
        (signature("r1", nonce="0" * 64), "round r1: its signature is not by the trusted key"),
        (signature("r0"), "round r1: its signature is not by the trusted key"),
        (signature("r1", adapter="other"), "round r1: its signature is not by the trusted key"),
    ],
    ids=["unsigned", "nonsense", "another key", "plan", "parent", "nonce", "another order", "another adapter"],
)
def test_an_order_that_the_centre_did_not_sign_is_refused_before_anything_trains(
    run: Run, tmp_path: Path, signed: str, why: str
) -> None:
    async def story(queue: Queue) -> None:
        with pytest.raises(AdapterError) as refused:
            queue.submit("r1", signature=signed)
        assert str(refused.value).startswith(why)
        with pytest.raises(NotFound):
            queue.jobs.report("r1")
        queue.submit("r2", signature=signature("r2"))
        await queue.ended("r2")
        assert queue.cotrainer.started == ["r2"]
        assert [path.name for path in (tmp_path / "rounds").glob("*/*")] == ["r2"]

    run(story)


def test_an_update_is_signed_for_the_order_that_it_answers(run: Run) -> None:
    async def story(queue: Queue) -> None:
        bound = {"run": "r" * 8, "nonce": "a" * 64}
        assert queue.submit("r1", signature=signature("r1", **bound), **bound).signature == ""
        report = await queue.ended("r1")
        statement = UpdateStatement.of("clinic-a", order("r1", **bound), report)
        signing.verify(SITE.public_key(), statement, report.signature)
        kept = queue.journal.rounds("support").get("r1")[1]
        assert kept == report, "asked again, also after a restart, it says the same"
        for name, value in {
            "site": "b",
            "order": order("r1"),
            "report": report.model_copy(update={"steps": 5}),
        }.items():
            with pytest.raises(AdapterError, match="for another order, update or counts"):
                signing.verify(SITE.public_key(), statement.model_copy(update={name: value}), report.signature)

    run(story)


def test_a_round_that_failed_has_nothing_to_sign(run: Run) -> None:
    async def story(queue: Queue) -> None:
        queue.cotrainer.fails_with = "no"
        queue.submit("r1", signature=signature("r1"))
        report = await queue.ended("r1")
        assert (report.state, report.signature) == (JobState.FAILED, "")

    run(story)


def test_without_keys_a_site_takes_every_order_and_signs_nothing() -> None:
    keys = SiteKeys(SiteSection(name="a", state_dir=Path("state")))
    keys.require(Submit(adapter="support", order=order("r1")), "")
    done = RoundReport(key="r1", state=JobState.DONE, parent="p", update="u")
    assert keys.sign_update(order("r1"), done) == done


@pytest.mark.parametrize("name", ["trusted_key", "signing_key"])
def test_a_key_that_cannot_be_read_ends_the_daemon_at_its_start(tmp_path: Path, name: str) -> None:
    path = write_keys(tmp_path)[name]
    path.write_text("no key")
    with pytest.raises(ConfigError, match=f"^{path}: not an Ed25519 "):
        SiteKeys(SiteSection(name="a", state_dir=tmp_path, **{name: path}))


def test_the_control_api_passes_the_signature_on(run: Run, tmp_path: Path) -> None:
    async def story(queue: Queue) -> None:
        tenants = {"support": SimpleNamespace(jobs=queue.jobs, keys=queue.jobs._keys)}
        site: Any = SimpleNamespace(
            config=site_config(tmp_path), tenant=tenants.__getitem__, tenants=tenants, live=lambda adapter: None,
            bodies=AdapterBodies(1 << 20),
        )  # fmt: skip
        async with httpx.AsyncClient(transport=httpx.ASGITransport(group_api(site)), base_url="http://site") as http:
            post = partial(http.post, "/adapters/support/rounds/r1", content=PARENT)
            headers = {"x-umbel-order": base64.b64encode(order("r1").model_dump_json().encode()).decode()}
            refused = await post(headers=headers)
            assert (refused.status_code, refused.json()["error"]["type"]) == (422, "AdapterError")
            taken = await post(headers={**headers, "x-umbel-signature": signature("r1")})
            assert (taken.status_code, taken.json()["key"]) == (200, "r1")

    run(story)


@pytest.mark.parametrize("path", ["/adapters/support/rounds/r1", "/adapters/support/shadow"])
def test_a_body_is_not_read_before_the_signature_is_checked(tmp_path: Path, path: str) -> None:
    """Gigabytes would be buffered for whoever can open the socket."""
    config, sent = site_config(tmp_path), []

    async def body() -> AsyncIterator[bytes]:
        sent.append(1)
        yield bytes(1 << 20)

    async def main() -> None:
        keys = SiteKeys(SiteSection(name="clinic-a", state_dir=tmp_path, **write_keys(tmp_path)))
        tenant = SimpleNamespace(keys=keys)  # jobs and deployer are not asked
        site: Any = SimpleNamespace(config=config, tenant=lambda name: tenant)
        manifest = manifest_of(1, adapter(1))
        headers = {
            "x-umbel-order": base64.b64encode(order("r1").model_dump_json().encode()).decode(),
            "x-umbel-manifest": base64.b64encode(manifest.model_dump_json().encode()).decode(),
        }
        async with httpx.AsyncClient(transport=httpx.ASGITransport(group_api(site)), base_url="http://site") as http:
            for wrong in ("", signing.sign(OTHER, manifest)):
                reply = await http.post(path, content=body(), headers={**headers, "x-umbel-signature": wrong})
                assert (reply.status_code, reply.json()["error"]["type"]) == (422, "AdapterError")

    asyncio.run(main())
    assert sent == []


NONCE = "ab" * 32
HELLO = Hello(
    site="clinic-a", adapter="support", fingerprint=BASE, shapes=SHAPES, dtype="float32", max_lora_rank=4,
    train_examples=1, eval_examples=1,
)  # fmt: skip


def test_a_hello_and_a_verdict_are_signed_for_the_question_that_was_asked(tmp_path: Path) -> None:
    keys = SiteKeys(SiteSection(name="clinic-a", state_dir=tmp_path, **write_keys(tmp_path)))
    manifest = manifest_of(1, adapter(1))
    report = ShadowReport(ref="support@v1", state=Lifecycle.JUDGED)

    async def main() -> None:
        def found(ref: object, nonce: str = "") -> ShadowReport:
            return keys.sign_verdict(manifest, report, nonce)

        tenant = SimpleNamespace(deployer=SimpleNamespace(report=found))
        site: Any = SimpleNamespace(
            keys=keys, hello=lambda adapter: HELLO, tenant=lambda name: tenant, tenants=(tenant,), stopping=True
        )
        async with httpx.AsyncClient(transport=httpx.ASGITransport(group_api(site)), base_url="http://site") as http:
            asks = {"adapter": "support", "nonce": NONCE}
            hello = Hello.model_validate_json((await http.get("/hello", params=asks)).content)
            asked = await http.get("/adapters/support@v1/shadow", params={"nonce": NONCE})
            said = ShadowReport.model_validate_json(asked.content)
            signing.verify(SITE.public_key(), HelloStatement.of(NONCE, hello), hello.signature)
            statement = VerdictStatement.of("clinic-a", NONCE, manifest, said)
            signing.verify(SITE.public_key(), statement, said.signature)
            for other in (HelloStatement.of("cd" * 32, hello), statement.model_copy(update={"nonce": "cd" * 32})):
                with pytest.raises(AdapterError, match="for another question"):
                    signing.verify(SITE.public_key(), other, hello.signature)
            unasked = (await http.get("/hello", params={"adapter": "support"})).json()
            assert unasked["signature"] == "", "without a question nothing is signed"

    asyncio.run(main())
    keyless = SiteKeys(SiteSection(name="clinic-a", state_dir=tmp_path))
    assert keyless.sign_hello(HELLO, NONCE) == HELLO
    assert keyless.sign_verdict(manifest, report, NONCE) == report


def test_each_adapter_trusts_the_centre_of_its_own_federation(tmp_path: Path) -> None:
    section = SiteSection(name="clinic-a", state_dir=tmp_path, **write_keys(tmp_path))
    pem = OTHER.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "other.pub").write_bytes(pem)
    manifest = manifest_of(1, adapter(1))
    sites, others = SiteKeys(section), SiteKeys(section, tmp_path / "other.pub")
    others.require(manifest, signing.sign(OTHER, manifest))
    sites.require(manifest, signing.sign(CENTRE, manifest))
    for keys, wrong in ((others, CENTRE), (sites, OTHER)):
        with pytest.raises(AdapterError, match="is not by the trusted key"):
            keys.require(manifest, signing.sign(wrong, manifest))
