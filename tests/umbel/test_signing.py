"""Signatures: anything changed, or signed with another key, is refused, and so is anything that is no key."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from umbel import signing, wire
from umbel.adapter import AdapterManifest, Personal
from umbel.base.fingerprint import BaseFingerprint
from umbel.errors import AdapterError, ConfigError
from umbel.messages import Hello, JobState, RoundOrder, RoundReport, Shadow, Submit, TrainPlan
from umbel.peft_dir import encode_manifest
from umbel.statements import HelloStatement, UpdateStatement

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER_KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
BASE = BaseFingerprint(weights="w", config="c", quantization="q", tokenizer="t", chat_template="x")
FULL: dict[str, Any] = {
    "name": "support", "version": 3, "digest": "0" * 64, "base": BASE.digest, "fingerprint": BASE, "lineage": "f00d",
    "round": 4, "parent": "1" * 64, "parents": ("1" * 64, "2" * 64), "truncation_of": "3" * 64,
    "rounding_of": "6" * 64, "change_certificate": {"m": 1e-300}, "rank": 8,
    "target_modules": ("q_proj", "v_proj"), "strategy": "exact",
    "options": {"robust": "none", "norm_clip": 2.0, "byzantine": 0, "buffered": False},
    "weights": {"clinic-b": 0.1 + 0.2, "clinic-a": 1e-7}, "left_out": {"klinik-ü": "NaN in “q_proj”"},
    "certificate": {"m": 1e-300}, "metrics": {"train-loss": float("nan"), "other": float("inf")},
    "site_metrics": {"clinic-a": {"seconds": 1.5}}, "counts": {"clinic-a": {"num-examples": 7}}, "run_id": "9",
    "code": "0.1.0", "config": "4" * 64, "created": "2026-11-21T07:00:00+00:00",
    "personal": Personal(part="adapter", rank=4), "kin": "7" * 64, "bases": {"nf4": 0.6, "bfloat16": 0.4},
    "skipped": {"clinic-c": "nothing worth training: 1"},
}  # fmt: skip
OTHER: dict[str, Any] = {
    "name": "other", "version": 4, "digest": "5" * 64, "base": "5" * 64, "fingerprint": None, "lineage": "f00e",
    "round": 5, "parent": None, "parents": ("2" * 64, "1" * 64), "truncation_of": None,
    "rounding_of": None, "change_certificate": {"m": 0.0}, "rank": 7,
    "target_modules": ("v_proj", "q_proj"), "strategy": "init", "options": {**FULL["options"], "byzantine": 0.0},
    "weights": {"clinic-b": 0.3, "clinic-a": 1e-7}, "left_out": {}, "certificate": {"m": 0.0},
    "metrics": {"train-loss": 0.0, "other": float("inf")}, "site_metrics": {}, "counts": {"clinic-a": {}},
    "run_id": "", "code": "0.1.1", "config": "", "created": "",
    "personal": Personal(part="adapter", rank=3), "kin": "", "bases": {"nf4": 0.6, "float16": 0.4},
    "skipped": {"clinic-c": "nothing worth training: 2"},
}  # fmt: skip
"""Field → another value that is as near as possible."""


def manifest(**changes: Any) -> AdapterManifest:
    return AdapterManifest(**{**FULL, **changes})


def signed(of: AdapterManifest, signature: str) -> bool:
    try:
        signing.verify(KEY.public_key(), of, signature)
    except AdapterError:
        return False
    return True


def test_a_signature_holds_through_files_and_messages() -> None:
    made, signature = manifest(), signing.sign(KEY, manifest())
    assert len(signature) == 128
    assert signed(made, signature)
    assert signed(AdapterManifest.model_validate_json(encode_manifest(made)), signature)
    sent = wire.unpack_model(wire.pack_model(Shadow(manifest=made, signature=signature)), Shadow)
    assert signed(AdapterManifest.model_validate_json(sent.manifest.model_dump_json()), sent.signature)


def test_it_does_not_depend_on_the_order_in_which_sites_answered() -> None:
    assert signed(manifest(weights=dict(reversed(FULL["weights"].items()))), signing.sign(KEY, manifest()))


@pytest.mark.parametrize("field", AdapterManifest.model_fields)
def test_every_field_is_signed(field: str) -> None:
    assert not signed(manifest(**{field: OTHER[field]}), signing.sign(KEY, manifest()))


def test_one_flipped_bit_of_a_manifest_is_noticed() -> None:
    content, signature, others = encode_manifest(manifest()), signing.sign(KEY, manifest()), 0
    same = json.loads(content)
    for at in range(len(content)):
        flipped = bytearray(content)
        flipped[at] ^= 1
        try:
            changed = AdapterManifest.model_validate_json(bytes(flipped))
        except ValueError:
            continue
        another = json.loads(changed.model_dump_json()) != same  # the last digit of a number may mean nothing
        assert signed(changed, signature) is not another, (at, bytes(flipped[at - 20 : at + 20]))
        others += another
    assert others > len(content) / 4


def test_one_flipped_bit_of_a_signature_is_noticed() -> None:
    made, signature = manifest(), bytes.fromhex(signing.sign(KEY, manifest()))
    for at in range(len(signature)):
        flipped = bytearray(signature)
        flipped[at] ^= 1
        assert not signed(made, flipped.hex()), at


@pytest.mark.parametrize("signature", ["", "00", "x" * 128, "0" * 128, "0" * 126, "é"])
def test_what_is_no_signature_is_refused(signature: str) -> None:
    with pytest.raises(AdapterError, match=r"^support@v3: it(s signature is not by| is not signed; the centre signs)"):
        signing.verify(KEY.public_key(), manifest(), signature)


def test_another_key_is_refused() -> None:
    with pytest.raises(AdapterError, match="not by the trusted key"):
        signing.verify(KEY.public_key(), manifest(), signing.sign(OTHER_KEY, manifest()))


def test_the_key_signs_manifests_only() -> None:
    message = signing.canonical(manifest())
    assert message.startswith(signing.CONTEXT)
    assert not signed(manifest(), KEY.sign(message.removeprefix(signing.CONTEXT)).hex())


def test_a_field_that_a_later_release_adds_leaves_signatures_valid() -> None:
    class Later(AdapterManifest):
        novelty: dict[str, int] = {}  # noqa: RUF012 - pydantic copies it

    later = Later.model_validate(manifest().model_dump())
    assert signed(later, signing.sign(KEY, manifest()))
    assert not signed(later.model_copy(update={"novelty": {"a": 1}}), signing.sign(KEY, manifest()))


def test_an_order_and_a_hello_without_kin_are_signed_as_by_earlier_releases() -> None:
    """They lie inside what is signed, where defaults are not left out."""
    plan = TrainPlan(rank=1, steps=1, seconds=1.0)
    order = RoundOrder(key="k", base="b", parent="p", round=1, plan=plan)
    hello = Hello(
        site="a", adapter="support", fingerprint=BASE, shapes={"q_proj": (6, 5)}, dtype="float32",
        max_lora_rank=4, train_examples=1, eval_examples=1,
    )  # fmt: skip
    report = RoundReport(key="k", state=JobState.DONE, parent="p")

    def signed_of(**kin: str) -> list[bytes]:
        said, greeted = order.model_copy(update=kin), hello.model_copy(update=kin)
        submit, update = Submit(adapter="support", order=said), UpdateStatement.of("a", said, report)
        return [signing.canonical(one) for one in (submit, update, HelloStatement.of("0", greeted))]

    assert not any(b'"kin"' in content or b'"packing"' in content for content in signed_of())
    assert all(b'"kin"' in content for content in signed_of(kin="1" * 64))


# Key files


def pem(key: Any, encryption: KeySerializationEncryption = NoEncryption()) -> bytes:  # noqa: B008
    content: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
    return content


def public_pem(key: Any) -> bytes:
    content: bytes = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return content


EC, RSA = ec.generate_private_key(ec.SECP256R1()), rsa.generate_private_key(65537, 2048)
OPENSSH = KEY.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


def test_keys_are_read_from_their_files(tmp_path: Path) -> None:
    (tmp_path / "public").write_bytes(public_pem(KEY))
    (tmp_path / "private").write_bytes(pem(KEY))
    (tmp_path / "private").chmod(0o600)
    signature = signing.sign(signing.read_private(tmp_path / "private"), manifest())
    signing.verify(signing.read_public(tmp_path / "public"), manifest(), signature)


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs the openssl command")
def test_keys_are_those_that_openssl_makes(tmp_path: Path) -> None:
    for command in ("genpkey -algorithm ed25519 -out private", "pkey -pubout -in private -out public"):
        subprocess.run(["openssl", *command.split()], cwd=tmp_path, check=True, umask=0o077)
    signature = signing.sign(signing.read_private(tmp_path / "private"), manifest())
    signing.verify(signing.read_public(tmp_path / "public"), manifest(), signature)


@pytest.mark.parametrize(
    "content",
    [b"", b"nonsense", public_pem(KEY), pem(EC), pem(RSA), pem(KEY, BestAvailableEncryption(b"secret")), OPENSSH],
    ids=["empty", "nonsense", "public", "P-256", "RSA", "passphrase", "OpenSSH"],
)
def test_what_is_no_private_key_is_refused_without_being_shown(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=f"^{path}: not an Ed25519 private key") as refused:
        signing.read_private(path)
    assert not any(line in str(refused.value) for line in content.decode().splitlines() if len(line) > 20)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620])
def test_a_private_key_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "key").write_bytes(pem(KEY))
    (tmp_path / "key").chmod(mode)
    with pytest.raises(ConfigError, match=r"others can read the private key; chmod 600"):
        signing.read_private(tmp_path / "key")


@pytest.mark.parametrize(
    "content",
    [b"", b"nonsense", pem(KEY), public_pem(EC), public_pem(RSA)],
    ids=["empty", "nonsense", "private", "P-256", "RSA"],
)
def test_what_is_no_public_key_is_refused_without_being_shown(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"^{path}: not an Ed25519 public key") as refused:
        signing.read_public(path)
    assert not any(line in str(refused.value) for line in content.decode().splitlines() if len(line) > 20)


@pytest.mark.parametrize("read", [signing.read_private, signing.read_public])
@pytest.mark.parametrize(("name", "why"), [("none", "No such file"), (".", "Is a directory")])
def test_a_key_that_is_not_there_is_named(tmp_path: Path, read: Any, name: str, why: str) -> None:
    with pytest.raises(ConfigError, match=f"the key cannot be read .{why}"):
        read(tmp_path / name)
