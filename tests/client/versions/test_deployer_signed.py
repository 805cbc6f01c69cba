"""A site that trusts a key takes what the centre signed; the rest is refused before anything is stored or loaded."""

import base64
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from client.versions.version_files import directory
from serving.trainer_socket import CoTrainerClient, CoTrainerStatus
from tests.toys import deployment as toy_deployment
from tests.toys.deployment import Deployment, adapter, manifest_of, quick, run
from tests.toys.engine import ToyMachine, site_config
from umbel import signing
from umbel.adapter import AdapterManifest, AdapterRef, Lifecycle
from umbel.errors import AdapterError, ConfigError
from umbel.messages import ShadowReport, Verdict
from umbel.site.config import SiteConfig
from umbel.statements import VerdictStatement

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER_KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
V1 = AdapterRef("support", 1)
BLOB = adapter(1)
MANIFEST = manifest_of(1, BLOB)
TRUNCATED = MANIFEST.model_copy(update={"truncation_of": "f" * 64})
NONCE = "ab" * 32
SIGNATURE = signing.sign(KEY, MANIFEST)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> ToyMachine:
    async def measured(_: CoTrainerClient) -> CoTrainerStatus:
        return CoTrainerStatus(latency_known=True)

    made = ToyMachine()
    quick(monkeypatch, made)
    monkeypatch.setattr(CoTrainerClient, "status", measured)  # there is none, and the supervisor would wait for it
    return made


@pytest.fixture
def trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A key file that every site file names."""
    path = tmp_path / "centre-signing.pub"
    path.write_bytes(KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))

    def trusting(state_dir: Path) -> SiteConfig:
        config = site_config(state_dir)
        return config.model_copy(update={"site": config.site.model_copy(update={"trusted_key": path})})

    monkeypatch.setattr(toy_deployment, "site_config", trusting)
    return path


@pytest.mark.parametrize(
    ("signature", "why"),
    [
        ("", "support@v1: it is not signed; the centre signs with `signing-key`"),
        (signing.sign(OTHER_KEY, MANIFEST), "support@v1: its signature is not by the trusted key"),
        (signing.sign(KEY, manifest_of(2, BLOB)), "support@v1: its signature is not by the trusted key"),
        (signing.sign(KEY, TRUNCATED), "support@v1: its signature is not by the trusted key"),
        ("nonsense", "support@v1: its signature is not by the trusted key"),
    ],
    ids=["unsigned", "another key", "another version", "its truncation", "nonsense"],
)
def test_what_the_centre_did_not_sign_is_refused_before_anything_is_stored_or_loaded(
    tmp_path: Path, machine: ToyMachine, trusted: Path, signature: str, why: str
) -> None:
    async def story(site: Deployment) -> None:
        await site.ready()
        before, calls = site.after_a_kill(), machine.calls.copy()
        with pytest.raises(AdapterError) as refused:
            site.deployer.receive(MANIFEST, BLOB, signature)
        assert str(refused.value).startswith(why)
        assert "\n" not in str(refused.value)
        await site.quiet()
        assert (site.after_a_kill(), machine.calls) == (before, calls)
        assert (site.journal.versions(), directory(site.config, V1).exists()) == ([], False)

    run(tmp_path, machine, story)


@pytest.mark.parametrize("manifest", [MANIFEST, TRUNCATED], ids=["whole", "truncation"])
def test_what_the_centre_signed_is_taken(
    tmp_path: Path, machine: ToyMachine, trusted: Path, manifest: AdapterManifest
) -> None:
    async def story(site: Deployment) -> None:
        await site.ready()
        header = base64.b64encode(manifest.model_dump_json().encode()).decode()
        headers = {"x-umbel-manifest": header, "x-umbel-signature": signing.sign(KEY, manifest)}
        async with site.http() as http:
            taken = await http.post("/adapters/support/shadow", content=BLOB, headers=headers)
            assert (taken.status_code, taken.json()["state"]) == (200, "candidate")
            assert (await site.judged(V1)).state is Lifecycle.JUDGED
            del headers["x-umbel-signature"]
            again = await http.post("/adapters/support/shadow", content=BLOB, headers=headers)
            assert (again.status_code, again.json()["error"]["type"]) == (422, "AdapterError")
            assert again.json()["error"]["message"].startswith("clinic-a: support@v1: it is not signed")

    run(tmp_path, machine, story)


def test_signed_but_other_weights_are_refused(tmp_path: Path, machine: ToyMachine, trusted: Path) -> None:
    async def story(site: Deployment) -> None:
        await site.ready()
        with pytest.raises(AdapterError, match="not those of its manifest"):
            site.deployer.receive(MANIFEST, adapter(2), SIGNATURE)
        assert site.journal.versions() == []

    run(tmp_path, machine, story)


def test_a_site_without_a_key_takes_both(tmp_path: Path, machine: ToyMachine) -> None:
    async def story(site: Deployment) -> None:
        await site.ready()
        assert site.push(1) == V1
        await site.judged(V1)
        blob = adapter(2)
        manifest = manifest_of(2, blob)
        site.deployer.receive(manifest, blob, signing.sign(OTHER_KEY, manifest))
        assert (await site.judged(manifest.ref)).state is Lifecycle.JUDGED

    run(tmp_path, machine, story)


def test_a_verdict_is_signed_for_the_question_the_version_and_its_registry(tmp_path: Path, machine: ToyMachine) -> None:
    async def story(site: Deployment) -> None:
        site.deployer._keys._own = OTHER_KEY
        await site.ready()
        header = base64.b64encode(MANIFEST.model_dump_json().encode()).decode()
        async with site.http() as http:
            push = partial(http.post, "/adapters/support/shadow", headers={"x-umbel-manifest": header}, content=BLOB)
            received = ShadowReport.model_validate_json((await push(params={"nonce": NONCE})).content)
            await site.judged(V1)
            asked = await http.get("/adapters/support@v1/shadow", params={"nonce": NONCE, "wait": "1"})
            judged = ShadowReport.model_validate_json(asked.content)
            again = ShadowReport.model_validate_json((await push(params={"nonce": NONCE})).content)
        assert (judged.verdict is not None, again) == (True, judged)
        for report in (received, judged):
            statement = VerdictStatement.of("clinic-a", NONCE, MANIFEST, report)
            signing.verify(OTHER_KEY.public_key(), statement, report.signature)
        wrong: dict[str, object] = {
            "site": "b", "nonce": "cd" * 32, "lineage": "other", "digest": "f" * 64,
            "report": judged.model_copy(update={"verdict": Verdict(accepted=True, reasons=())}),
        }  # fmt: skip
        assert wrong.keys() == VerdictStatement.model_fields.keys()
        for name, value in wrong.items():
            with pytest.raises(AdapterError, match="for another question, version, registry or report"):
                signing.verify(OTHER_KEY.public_key(), statement.model_copy(update={name: value}), judged.signature)
        assert site.deployer.report(V1).signature == "", "the journal keeps none: it is for one question"

    run(tmp_path, machine, story)


def broken(path: Path) -> None:
    path.write_text("no key")


@pytest.mark.parametrize("hurt", [Path.unlink, broken], ids=["missing", "broken"])
def test_a_key_that_cannot_be_read_ends_the_daemon_at_its_start(
    tmp_path: Path, trusted: Path, hurt: Callable[[Path], None]
) -> None:
    hurt(trusted)
    with pytest.raises(ConfigError, match=f"^{trusted}: "):
        Deployment(tmp_path)
