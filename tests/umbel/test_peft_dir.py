"""Adapters as bytes and directories: anything written is read back, and anything else is refused."""

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umbel import peft_dir
from umbel.adapter import AdapterManifest
from umbel.errors import AdapterError

RANK = 2
SHAPES = {"model.layers.0.self_attn.q_proj": (6, 5), "model.layers.0.mlp.down_proj": (5, 8)}
DTYPES: list[Any] = [np.float32, np.float16, ml_dtypes.bfloat16]


def adapter(dtype: Any = np.float32, rank: int = RANK) -> peft_dir.Tensors:
    generator = np.random.default_rng(0)
    tensors: peft_dir.Tensors = {}
    for module, (out, inner) in SHAPES.items():
        tensors[peft_dir.key(module, "A")] = generator.standard_normal((rank, inner)).astype(dtype)
        tensors[peft_dir.key(module, "B")] = generator.standard_normal((out, rank)).astype(dtype)
    return tensors


def manifest(blob: bytes, **changes: Any) -> AdapterManifest:
    fields: dict[str, Any] = {
        "name": "support", "version": 1, "digest": peft_dir.digest(blob), "base": "0" * 64, "lineage": "test",
        "round": 1, "rank": RANK, "target_modules": ("q_proj", "down_proj"),
    }  # fmt: skip
    return AdapterManifest(**{**fields, **changes})


BLOB = peft_dir.encode(adapter())
A_KEY, B_KEY = (peft_dir.key("model.layers.0.self_attn.q_proj", factor) for factor in "AB")


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_gives_back_what_was_encoded(dtype: Any) -> None:
    tensors = adapter(dtype)
    decoded = peft_dir.decode(peft_dir.encode(tensors))
    assert decoded.keys() == tensors.keys()
    for name, array in tensors.items():
        assert decoded[name].dtype == dtype
        np.testing.assert_array_equal(decoded[name], array)


def test_equal_tensors_are_equal_bytes_whatever_their_order_and_layout() -> None:
    tensors = adapter()
    shuffled = {name: np.asfortranarray(tensors[name]) for name in reversed(list(tensors))}
    assert peft_dir.encode(shuffled) == BLOB


def test_factors_pairs_a_with_b() -> None:
    tensors = adapter()
    pairs = peft_dir.factors(tensors)
    assert sorted(pairs) == sorted(SHAPES)
    assert pairs["model.layers.0.self_attn.q_proj"][0] is tensors[A_KEY]
    assert pairs["model.layers.0.self_attn.q_proj"][1] is tensors[B_KEY]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_canonical_adapter_is_valid(dtype: Any) -> None:
    peft_dir.validate(adapter(dtype), SHAPES, rank=RANK, max_rank=RANK)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_untrained_module_changes_nothing_and_is_drawn_as_peft_does(dtype: Any) -> None:
    tensors = peft_dir.untrained("q", (6, 100), 4, dtype, np.random.default_rng(0))
    a, b = peft_dir.factors(tensors)["q"]
    assert (a.shape, b.shape, a.dtype, b.dtype) == ((4, 100), (6, 4), dtype, dtype)
    assert not b.any()
    drawn = a.astype(np.float64)
    assert np.abs(drawn).max() <= 0.1 * 1.01  # 1/√in, and rounding
    assert drawn.std() == pytest.approx(0.1 / 3**0.5, rel=0.1)


def without(*names: str) -> peft_dir.Tensors:
    return {name: array for name, array in adapter().items() if name not in names}


def spoiled(value: float, dtype: Any = np.float32) -> peft_dir.Tensors:
    tensors = adapter(dtype)
    tensors[B_KEY][3, 1] = value
    return tensors


REFUSALS: list[tuple[peft_dir.Tensors, str]] = [
    (spoiled(np.nan), "q_proj.lora_B holds NaN"),
    (spoiled(-np.inf), "q_proj.lora_B holds NaN or infinity"),
    (spoiled(np.nan, ml_dtypes.bfloat16), "q_proj.lora_B holds NaN"),
    (adapter(rank=RANK + 1), r"shape \[3, "),
    ({**adapter(), A_KEY: adapter()[A_KEY].T.copy()}, r"q_proj.lora_A has shape \[5, 2\], the base needs \[2, 5\]"),
    ({**adapter(), A_KEY: adapter()[A_KEY].ravel()}, r"lora_A has shape \[10\]"),
    (without(B_KEY), "q_proj has only lora_A"),
    (without(A_KEY, B_KEY), "lacks model.layers.0.self_attn.q_proj"),
    ({}, "lacks model.layers.0.mlp.down_proj .and 1 more"),
    ({**adapter(), peft_dir.key("lm_head", "A"): np.zeros((2, 5), np.float32),
      peft_dir.key("lm_head", "B"): np.zeros((9, 2), np.float32)}, "has lm_head, which is not adapted"),
    ({**adapter(), "base_model.model.lm_head.weight": np.zeros((2, 5), np.float32)}, "lm_head.weight is not a LoRA"),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "reason"), REFUSALS, ids=[reason for _, reason in REFUSALS])
def test_anything_else_is_refused_with_where_and_why(tensors: peft_dir.Tensors, reason: str) -> None:
    with pytest.raises(AdapterError, match=reason):
        peft_dir.validate(tensors, SHAPES, rank=RANK, max_rank=8)


@pytest.mark.parametrize("rank", [0, -1, 9])
def test_a_rank_that_the_engine_cannot_hold_is_refused_with_what_to_do(rank: int) -> None:
    with pytest.raises(AdapterError, match=r"rank -?\d is not within 1..8.*max_lora_rank"):
        peft_dir.validate(adapter(), SHAPES, rank=rank, max_rank=8)


@pytest.mark.parametrize("dtype", [np.float64, np.int8, np.int32, np.bool_])
def test_other_number_formats_are_refused_by_name(dtype: Any) -> None:
    with pytest.raises(AdapterError, match="expected one of F32, F16, BF16"):
        peft_dir.decode(peft_dir.encode({A_KEY: np.zeros((2, 5), dtype)}))


def only_adapter_errors(blob: bytes) -> None:
    with contextlib.suppress(AdapterError):
        peft_dir.validate(peft_dir.decode(blob), SHAPES, rank=RANK, max_rank=8)


@given(st.binary(max_size=400))
def test_random_bytes_raise_nothing_but_adapter_errors(blob: bytes) -> None:
    only_adapter_errors(blob)


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, len(BLOB) - 1), st.integers(0, 255)), max_size=4), st.integers(0, len(BLOB)))
def test_damaged_adapters_raise_nothing_but_adapter_errors(changes: list[tuple[int, int]], length: int) -> None:
    damaged = bytearray(BLOB)
    for at, value in changes:
        damaged[at] = value
    only_adapter_errors(bytes(damaged))
    only_adapter_errors(bytes(damaged[:length]))


ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F64", "F8_E4M3", "BOOL", "junk", 3]),
        "shape": st.lists(st.integers(-1, 2**63), max_size=3),
        "data_offsets": st.lists(st.integers(-1, 2**64), min_size=2, max_size=2),
    }
)


@given(st.dictionaries(st.sampled_from([A_KEY, B_KEY, "x", "__metadata__"]), ENTRY, max_size=3), st.binary(max_size=64))
def test_lying_headers_raise_nothing_but_adapter_errors(header: dict[str, Any], data: bytes) -> None:
    encoded = json.dumps(header).encode()
    only_adapter_errors(struct.pack("<Q", len(encoded)) + encoded + data)


def test_a_version_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    directory = tmp_path / "adapters" / "support-v1"
    peft_dir.write(directory, BLOB, manifest(BLOB), base="/models/base")
    assert peft_dir.read(directory) == (BLOB, manifest(BLOB))
    config = json.loads((directory / peft_dir.CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (RANK, RANK, "/models/base")
    assert config["target_modules"] == ["down_proj", "q_proj"]
    assert [entry.name for entry in directory.parent.iterdir()] == ["support-v1"], "no temporary directory is left"


def test_writing_the_same_version_again_is_no_change(tmp_path: Path) -> None:
    directory = tmp_path / "support-v1"
    peft_dir.write(directory, BLOB, manifest(BLOB), base="b")
    before = {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in directory.iterdir()}
    peft_dir.write(directory, BLOB, manifest(BLOB), base="b")
    assert {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in directory.iterdir()} == before


def test_a_version_is_never_written_over_with_other_weights(tmp_path: Path) -> None:
    directory, other = tmp_path / "support-v1", peft_dir.encode(spoiled(0.5))
    peft_dir.write(directory, BLOB, manifest(BLOB), base="b")
    with pytest.raises(AdapterError, match="immutable"):
        peft_dir.write(directory, other, manifest(other), base="b")
    assert peft_dir.read(directory)[0] == BLOB


def test_a_write_that_fails_leaves_no_version_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full at the last file."""
    real = peft_dir.write_durably

    def full(path: Path, content: bytes) -> None:
        if path.name == peft_dir.MANIFEST:
            raise OSError(28, "No space left on device")
        real(path, content)

    monkeypatch.setattr(peft_dir, "write_durably", full)
    with pytest.raises(OSError, match="No space"):
        peft_dir.write(tmp_path / "support-v1", BLOB, manifest(BLOB), base="b")
    assert not (tmp_path / "support-v1").exists()
    monkeypatch.undo()
    peft_dir.write(tmp_path / "support-v1", BLOB, manifest(BLOB), base="b")
    assert [entry.name for entry in tmp_path.iterdir()] == ["support-v1"], "what was left is cleared away"


@pytest.mark.parametrize("at", [0, 8, len(BLOB) // 2, len(BLOB) - 1])
@pytest.mark.parametrize("bit", [1, 128])
def test_read_notices_a_single_flipped_bit(tmp_path: Path, at: int, bit: int) -> None:
    peft_dir.write(tmp_path / "v", BLOB, manifest(BLOB), base="b")
    damaged = bytearray(BLOB)
    damaged[at] ^= bit
    (tmp_path / "v" / peft_dir.WEIGHTS).write_bytes(damaged)
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors: its sha256"):
        peft_dir.read(tmp_path / "v")


@pytest.mark.parametrize(
    ("key", "value"),
    [("lora_alpha", 1e9), ("r", 64), ("use_rslora", True), ("use_dora", True), ("alpha_pattern", {"q_proj": 1e9}),
     ("rank_pattern", {"q_proj": 9}), ("lora_alpha", None)],
)  # fmt: skip
def test_read_notices_settings_that_scale_the_weights_otherwise(tmp_path: Path, key: str, value: object) -> None:
    peft_dir.write(tmp_path / "v", BLOB, manifest(BLOB), base="b")
    file = tmp_path / "v" / peft_dir.CONFIG
    good = file.read_bytes()
    file.write_text(json.dumps({**json.loads(good), key: value}))
    with pytest.raises(AdapterError, match=rf"adapter_config.json: {key} is not .*; the file was changed or damaged"):
        peft_dir.read(tmp_path / "v")
    for damage in (b"", b"[]", b"[" * 100_000):
        file.write_bytes(damage)
        with pytest.raises(AdapterError, match=r"adapter_config.json: .* was changed or damaged"):
            peft_dir.read(tmp_path / "v")
    file.write_bytes(good)
    assert peft_dir.read(tmp_path / "v")[0] == BLOB


@pytest.mark.parametrize("missing", [peft_dir.WEIGHTS, peft_dir.CONFIG, peft_dir.MANIFEST])
def test_read_names_the_file_that_is_missing(tmp_path: Path, missing: str) -> None:
    peft_dir.write(tmp_path / "v", BLOB, manifest(BLOB), base="b")
    (tmp_path / "v" / missing).unlink()
    with pytest.raises(AdapterError, match=missing):
        peft_dir.read(tmp_path / "v")


@pytest.mark.parametrize("damage", [b"", b"{}", b"not JSON", b"\xff\xfe"])
def test_a_damaged_manifest_is_an_adapter_error(tmp_path: Path, damage: bytes) -> None:
    peft_dir.write(tmp_path / "v", BLOB, manifest(BLOB), base="b")
    (tmp_path / "v" / peft_dir.MANIFEST).write_bytes(damage)
    with pytest.raises(AdapterError):
        peft_dir.read(tmp_path / "v")


def test_a_file_is_replaced_whole_and_leaves_no_temporary(tmp_path: Path) -> None:
    target = tmp_path / "aliases.json"
    for content in (b"first", b"second"):
        peft_dir.replace_durably(target, content)
        assert target.read_bytes() == content
    assert list(tmp_path.iterdir()) == [target]
