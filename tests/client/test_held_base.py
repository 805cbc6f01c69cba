"""The base of a site: its kin, whose word the site takes for it, and what it accepts."""

import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from client.held_base import HeldBase
from client.keys import SiteKeys
from tests.toys.deployment import BASE
from umbel import signing
from umbel.base.fingerprint import BaseFingerprint
from umbel.base.origin import ORIGIN, BaseOrigin
from umbel.errors import BaseMismatch
from umbel.site.sections import SiteSection

CENTRE, OTHER = (Ed25519PrivateKey.from_private_bytes(bytes([n] * 32)) for n in (1, 2))
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
KIN = "1" * 64


def a_base(folder: Path, weights: str, **config: Any) -> Path:
    """A directory with the files that count; their content does not matter here."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 12, **config}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_text(weights)
    return folder


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return a_base(tmp_path / "dense", "in 16 bits")


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return a_base(tmp_path / "packed", "in 4 bits", quantization_config=NF4)


def keys(tmp_path: Path, trusting: bool) -> SiteKeys:
    path = tmp_path / "centre.pub"
    path.write_bytes(CENTRE.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return SiteKeys(SiteSection(name="a", state_dir=tmp_path, trusted_key=path if trusting else None))


def write_origin(dense: Path, packed: Path, by: Ed25519PrivateKey | None = None) -> None:
    origin = BaseOrigin(
        base=BaseFingerprint.of(dense), packed=BaseFingerprint.of(packed), recipe={"quant_type": "nf4"},
        bitsandbytes="0.50.2",
    )  # fmt: skip
    signature = signing.sign(by, origin) if by else ""
    (packed / ORIGIN).write_text(origin.model_copy(update={"signature": signature}).model_dump_json())


@pytest.mark.parametrize("trusting", [True, False])
def test_a_dense_base_is_its_own_origin(tmp_path: Path, dense: Path, trusting: bool) -> None:
    held = HeldBase.read(dense, keys(tmp_path, trusting))
    assert held == HeldBase(BaseFingerprint.of(dense), BaseFingerprint.of(dense).kin, "")


@pytest.mark.parametrize(
    ("trusting", "by", "is_kin"),
    [(True, CENTRE, True), (True, None, False), (True, OTHER, False), (False, None, True), (False, OTHER, True)],
    ids=["signed", "unsigned", "another key", "unsigned, no trusted key", "another key, no trusted key"],
)
def test_a_packed_base_is_kin_by_an_origin_that_the_trusted_key_signed(
    tmp_path: Path, dense: Path, packed: Path, caplog: pytest.LogCaptureFixture,
    trusting: bool, by: Ed25519PrivateKey | None, is_kin: bool,
) -> None:  # fmt: skip
    write_origin(dense, packed, by)
    held = HeldBase.read(packed, keys(tmp_path, trusting))
    assert (held.fingerprint, held.packing) == (BaseFingerprint.of(packed), "nf4")
    assert held.kin == (BaseFingerprint.of(dense).kin if is_kin else "")
    assert ("base.unsigned" in caplog.text) == (not is_kin)
    if not is_kin:
        for named in (str(packed), "`umbel base pack --signing-key`", "copy origin.json of the centre's pack"):
            assert named in caplog.text


def test_a_packed_base_without_an_origin_is_kin_to_none(tmp_path: Path, packed: Path) -> None:
    held = HeldBase.read(packed, keys(tmp_path, True))
    assert (held.kin, held.packing) == ("", "nf4")


@pytest.mark.parametrize("damage", ["another directory", "no JSON", "packed from a packed one"])
def test_an_origin_that_is_wrong_makes_kin_to_none_and_the_site_starts(
    tmp_path: Path, dense: Path, packed: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    write_origin(packed if damage.startswith("packed") else dense, packed, CENTRE)
    said = "the base that was packed was packed already"
    if damage == "another directory":
        (packed / "model.safetensors").write_text("in other 4 bits")
        said = "weights differ; copy origin.json of this very directory again, or remove the file"
    if damage == "no JSON":
        (packed / ORIGIN).write_text("version https://git-lfs.github.com/spec/v1")
        said = "origin.json: a pointer of Git LFS; copy the model directory again"
    assert HeldBase.read(packed, keys(tmp_path, True)).kin == ""
    assert said in caplog.text


def test_what_is_for_the_base_or_for_its_kin_is_accepted_and_nothing_else() -> None:
    held = HeldBase(BASE, KIN)
    for base, kin, accepted in (
        (BASE.digest, "", True), (BASE.digest, "2" * 64, True), ("f" * 64, KIN, True),
        ("f" * 64, "", False), ("f" * 64, "2" * 64, False),
    ):  # fmt: skip
        assert held.accepts(base, kin) == accepted
    assert not HeldBase(BASE).accepts("f" * 64, ""), "who is kin to none is not kin to those that say none"


@pytest.mark.parametrize(
    ("held", "kin", "remedy"),
    [
        (HeldBase(BASE, KIN), "", "copy the same model directory to both; .* run with mixed-bases=true"),
        (HeldBase(BASE, KIN, "nf4"), "2" * 64, "copy the same model directory to both, or a base that was packed"),
        (HeldBase(BASE, "", "nf4"), KIN, r"says no origin that is trusted here; copy origin\.json"),
    ],
    ids=["not opted in", "another origin", "no origin"],
)
def test_a_refusal_names_the_remedy(held: HeldBase, kin: str, remedy: str) -> None:
    with pytest.raises(BaseMismatch, match=f"^round r1 is for the base f{{12}}…, this site holds .*{remedy}"):
        held.require("round r1 is for", "f" * 64, kin)
