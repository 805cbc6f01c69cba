"""A centre that signs: its stored versions, the versions it sends, and `umbel adapter verify --key`."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from server.registry import views as registry_views
from server.registry.registry import AdapterRegistry
from tests.toys.command_line import refusal, umbel
from tests.toys.federation import World, a_world
from tests.toys.registry import flip, v
from umbel import signing
from umbel.errors import ConfigError

KEY, OTHER_KEY = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()


@pytest.fixture
def world(tmp_path: Path, sockets: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with a_world(tmp_path / "registry", sockets, monkeypatch) as ready:
        yield ready


@pytest.fixture
def signing_key(tmp_path: Path) -> str:
    path = tmp_path / "signing.key"
    path.write_bytes(KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    path.chmod(0o600)
    return str(path)


def public(folder: Path, key: Ed25519PrivateKey) -> Path:
    path = folder / "signing.pub"
    path.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return path


def test_every_version_is_signed_as_it_is_kept_and_as_it_is_sent(world: World, signing_key: str) -> None:
    world.join_c().max_lora_rank = 1
    registry = world.start(**{"signing-key": signing_key})
    assert registry_views.verify(registry, key=KEY.public_key()) == {"versions": 3, "damages": [], "unsigned": []}
    for site, truncated in (("a", False), ("c", True)):
        toy = world.sites[site]
        assert toy.manifests.keys() == toy.signatures.keys() == {"support@v1", "support@v2"}
        for ref, received in toy.manifests.items():
            signing.verify(KEY.public_key(), received, toy.signatures[ref])
            assert (received.truncation_of is not None, received.site_metrics) == (truncated, {})
    assert world.sites["a"].signatures != world.sites["c"].signatures


def test_without_a_key_nothing_is_signed(world: World) -> None:
    registry = world.start(rounds=1)
    assert world.sites["a"].signatures == {"support@v1": ""}
    assert not list(world.root.rglob("*.sig"))
    found = registry_views.verify(registry, "support@v1", KEY.public_key())
    assert found == {"versions": 1, "damages": [], "unsigned": ["support@v1"]}, "not damaged, but unsigned"


def test_a_version_of_an_unsigned_run_is_signed_when_a_signing_run_sends_it(world: World, signing_key: str) -> None:
    for toy in world.sites.values():
        toy.shadow_polls = 10**6  # no verdict in time: the round stays open where its run is killed
    world.clock.after(30, _interrupt)
    with pytest.raises(KeyboardInterrupt):
        world.start(rounds=1)
    for toy in world.sites.values():
        toy.shadow_polls = 0
    assert world.sites["a"].signatures == {"support@v1": ""}
    world.start("two", rounds=1, **{"signing-key": signing_key})
    for ref, signature in world.sites["a"].signatures.items():
        signing.verify(KEY.public_key(), world.sites["a"].manifests[ref], signature)


def _interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("bit", [1, 128])
def test_a_changed_signature_is_found_and_named(world: World, signing_key: str, bit: int) -> None:
    registry = world.start(rounds=1, **{"signing-key": signing_key})
    file = registry.directory(v(1)) / "manifest.sig"
    size = file.stat().st_size
    assert size == 129
    for at in range(0, size - 1, 9):
        flip(file, at, bit)
        damages = registry_views.verify(registry, "support@v1", KEY.public_key())["damages"]
        flip(file, at, bit)
        assert len(damages) == 1, at
        assert damages[0].startswith(f"{file}: support@v1: its signature is not by the trusted key")
    found = registry_views.verify(registry, "support@v1", OTHER_KEY.public_key())["damages"]
    assert len(found) == 1
    assert "not by the trusted key" in found[0]


def test_who_rewrites_a_registry_whole_cannot_sign_it(world: World, signing_key: str) -> None:
    directory = world.start(rounds=1, **{"signing-key": signing_key}).directory(v(1))
    manifest = (directory / "manifest.json").read_text()
    (directory / "manifest.json").write_text(manifest.replace('"strategy": "exact"', '"strategy": "fedit"'))
    (directory / "SHA256SUMS").unlink()
    for index in world.root.glob("registry.sqlite*"):
        index.unlink()
    forged = AdapterRegistry(world.root)
    assert forged.manifest(v(1)).strategy == "fedit", "listed anew, as if it had been published so"
    signed = registry_views.verify(forged, key=KEY.public_key())["damages"]
    assert [damage for damage in signed if "manifest.sig: support@v1: its signature is not by" in damage]


def test_no_key_material_is_written_anywhere(world: World, signing_key: str, caplog: pytest.LogCaptureFixture) -> None:
    world.start(rounds=1, **{"signing-key": signing_key})
    secret = KEY.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
    pem = Path(signing_key).read_bytes().splitlines()[1]
    written = [file.read_bytes() for file in world.root.rglob("*") if file.is_file()] + [caplog.text.encode()]
    written += [toy.manifests["support@v1"].model_dump_json().encode() for toy in (world.sites["a"], world.sites["b"])]
    assert len(written) > 10
    for form in (secret, pem, secret.hex().encode()):
        assert not any(form in content for content in written)


def test_a_key_that_cannot_be_read_ends_the_run_before_it_begins(world: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.key: the key cannot be read"):
        world.start(**{"signing-key": str(tmp_path / "none.key")})
    assert not world.root.exists()


def test_verify_with_a_key_on_the_command_line(world: World, signing_key: str, tmp_path: Path) -> None:
    world.start(rounds=1, **{"signing-key": signing_key})
    ended = umbel("adapter", "verify", "--registry", world.root, "--key", public(tmp_path, KEY))
    assert (ended.returncode, ended.stdout) == (0, "2 versions read, 0 damaged files\n"), ended.stderr
    (world.root / "support" / "v000001" / "manifest.sig").unlink()
    ended = umbel("adapter", "verify", "support@v1", "--registry", world.root, "--key", public(tmp_path, KEY))
    assert ended.returncode == 1
    assert ended.stdout == "support@v1: unsigned\n1 versions read, 0 damaged files, 1 unsigned versions\n"
    wrong = refusal("adapter", "verify", "--registry", world.root, "--key", signing_key)
    assert "not an Ed25519 public key" in wrong
