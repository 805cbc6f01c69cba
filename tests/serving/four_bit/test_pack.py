"""A packed base is what transformers would have packed, says where it comes from, and is whole or not there."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors import SafetensorError, safe_open

from serving.four_bit import pack as module
from serving.four_bit.library import bitsandbytes
from serving.four_bit.pack import pack
from umbel import signing
from umbel.base.config import config_mistakes
from umbel.base.files import INDEX, file_mistakes, weight_files
from umbel.base.fingerprint import BaseFingerprint
from umbel.base.origin import ORIGIN, BaseOrigin
from umbel.base.shapes import LINEARS, base_bytes, linear_shapes, read_config, weight_shapes
from umbel.errors import AdapterError, BaseMismatch, ConfigError, NoRoom, UnsupportedModel


def silent(line: str) -> None:
    pass


def test_bytes_and_states_are_those_of_transformers(pair: tuple[Path, Path], tmp_path: Path) -> None:
    bitsandbytes()
    dense, packed = pair
    recipe = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32, quantization_config=recipe)
    model.save_pretrained(tmp_path)
    shards = (folder / "model.safetensors" for folder in (tmp_path, packed))
    with safe_open(next(shards), "pt") as theirs, safe_open(next(shards), "pt") as ours:
        assert set(ours.keys()) == set(theirs.keys())
        for name in ours.keys():  # noqa: SIM118
            one, other = ours.get_tensor(name), theirs.get_tensor(name)
            if "quant_state" in name:
                assert json.loads(bytes(one.tolist())) == json.loads(bytes(other.tolist()))
            else:
                assert torch.equal(one, other), name


def test_it_is_a_whole_base_that_is_smaller(pair: tuple[Path, Path]) -> None:
    dense, packed = pair
    assert list(config_mistakes(packed, read_config(packed))) == []
    assert list(file_mistakes(packed, weight_shapes(packed))) == []
    held, unpacked = base_bytes(packed, 4)
    assert base_bytes(dense, 4) == (unpacked, unpacked)
    linears = sum(n * k for n, k in linear_shapes(dense, LINEARS).values())
    assert unpacked - held == pytest.approx(linears * (4 - 4.127 / 8), rel=0.01)
    assert {file.name for file in dense.iterdir()} <= {file.name for file in packed.iterdir()}


def test_its_origin_is_the_base_and_signed(pair: tuple[Path, Path], tmp_path: Path) -> None:
    dense, _ = pair
    key = Ed25519PrivateKey.generate()
    errors = pack(dense, tmp_path / "out", key=key, tell=silent)
    assert len(errors) == len(linear_shapes(dense, LINEARS))
    assert all(0.05 < error < 0.15 for error in errors.values())
    fingerprint = BaseFingerprint.of(tmp_path / "out")
    origin = BaseOrigin.read(tmp_path / "out", fingerprint)
    assert origin is not None
    assert origin.base == BaseFingerprint.of(dense)
    assert origin.kin == BaseFingerprint.of(dense).kin != fingerprint.kin
    assert origin.bitsandbytes == bitsandbytes().__version__
    signing.verify(key.public_key(), origin, origin.signature)
    with pytest.raises(AdapterError, match=r"origin.json: its signature is not by the trusted key"):
        signing.verify(Ed25519PrivateKey.generate().public_key(), origin, origin.signature)


def test_packing_again_gives_the_same_directory(pair: tuple[Path, Path], tmp_path: Path) -> None:
    dense, packed = pair
    pack(dense, tmp_path / "again", tell=silent)
    assert BaseFingerprint.of(tmp_path / "again") == BaseFingerprint.of(packed)


def test_shards_stay_shards(pair: tuple[Path, Path], tmp_path: Path) -> None:
    dense, packed = pair
    model = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    shutil.copytree(dense, tmp_path / "sharded")
    (tmp_path / "sharded" / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    assert len(weight_files(tmp_path / "sharded")) > 1
    pack(tmp_path / "sharded", tmp_path / "out", tell=silent)
    assert list(file_mistakes(tmp_path / "out", weight_shapes(tmp_path / "out"))) == []
    assert (tmp_path / "out" / INDEX).is_file()
    ours, whole = ({}, {})
    for folder, into in ((tmp_path / "out", ours), (packed, whole)):
        for shard in weight_files(folder):
            with safe_open(shard, "pt") as file:
                into |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert ours.keys() == whole.keys()
    assert all(torch.equal(ours[name], whole[name]) for name in ours)


def test_what_cannot_be_packed_is_refused_and_leaves_nothing(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, packed = pair
    with pytest.raises(ConfigError, match=r"packed already \(nf4\); give the base that it was made of"):
        pack(packed, tmp_path / "out", tell=silent)
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="is there already; name a new directory"):
        pack(dense, tmp_path / "there", tell=silent)
    with pytest.raises(ConfigError, match="is inside the base that is packed; name a directory beside it"):
        pack(dense, dense / "nf4", tell=silent)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file is a file; name a directory that can be made"):
        pack(dense, tmp_path / "file" / "out", tell=silent)
    (tmp_path / "file").unlink()
    (tmp_path / ".out.999999999.tmp").mkdir()  # of a process that was killed
    monkeypatch.setattr(module, "LARGEST_ERROR", 1e-3)
    with pytest.raises(UnsupportedModel, match=r"in 4 bits is off by \d+% of its norm"):
        pack(dense, tmp_path / "out", tell=silent)
    assert [entry.name for entry in tmp_path.iterdir()] == ["there"]


def test_an_origin_of_another_directory_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    _, packed = pair
    shutil.copytree(packed, tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer.json").write_text("{}")
    with pytest.raises(BaseMismatch, match=r"tokenizer differ; copy origin.json of this very directory again"):
        BaseOrigin.read(tmp_path / "copy", BaseFingerprint.of(tmp_path / "copy"))
    (tmp_path / "copy" / ORIGIN).write_text("{}")
    with pytest.raises(ConfigError, match="base: Field required; copy the packed directory again"):
        BaseOrigin.read(tmp_path / "copy", BaseFingerprint.of(tmp_path / "copy"))
    (tmp_path / "copy" / ORIGIN).unlink()
    assert BaseOrigin.read(tmp_path / "copy", BaseFingerprint.of(tmp_path / "copy")) is None


def test_a_full_disk_is_told_and_leaves_nothing(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(module.safetensors.torch, "save_file", full)
    with pytest.raises(NoRoom, match=r"out: the packed weights cannot be written \(No space left on device\); make ro"):
        pack(pair[0], tmp_path / "out", tell=silent)
    assert list(tmp_path.iterdir()) == []


def test_other_users_may_read_what_they_could_read_before(pair: tuple[Path, Path]) -> None:
    dense, packed = ((folder / "model.safetensors").stat().st_mode for folder in pair)
    assert dense == packed
