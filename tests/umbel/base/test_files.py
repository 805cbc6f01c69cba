"""The files of a base: what can never be served is said from headers alone, each fault by its own file."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.toys.sites.base_dir import write_base, write_config, write_shard
from umbel.base.files import EMBEDDING, INDEX, LONGEST_HEADER, embedding_rows, file_mistakes, weight_files
from umbel.base.fingerprint import BaseFingerprint
from umbel.base.shapes import weight_shapes
from umbel.errors import ConfigError

SHARD = "model.safetensors"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def said(model: Path) -> list[str]:
    return [str(error) for error in file_mistakes(model, weight_shapes(model))]


def in_two_shards(model: Path) -> dict[str, str]:
    """Write a base in two shards with an index; return its weight_map."""
    shapes = weight_shapes(write_base(model))
    (model / SHARD).unlink()
    names = sorted(shapes)
    parts = {FIRST: names[: len(names) // 2], SECOND: names[len(names) // 2 :]}
    for file, part in parts.items():
        write_shard(model / file, {name: shapes[name] for name in part})
    where = {name: file for file, part in parts.items() for name in part}
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return where


def test_a_whole_base_is_fine_in_one_shard_and_in_two(tmp_path: Path) -> None:
    assert said(write_base(tmp_path / "one")) == []
    in_two_shards(tmp_path / "two")
    assert said(tmp_path / "two") == []
    assert embedding_rows(tmp_path / "one") == embedding_rows(tmp_path / "two") == 12


def cut(raw: bytes) -> bytes:
    return raw[:-1]


def within_the_header(raw: bytes) -> bytes:
    return raw[:40]


def header(entry: object, data: int = 0) -> Callable[[bytes], bytes]:
    raw = json.dumps(entry).encode()
    return lambda _: len(raw).to_bytes(8, "little") + raw + bytes(data)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda _: b"", "empty; copy it again"),
        (lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS, not the w"),
        (lambda _: b"<!DOCTYPE html><html>", "not a safetensors file; copy it again"),
        (lambda _: b"PK\x03\x04", "not a safetensors file"),
        (lambda _: (LONGEST_HEADER + 1).to_bytes(8, "little") + b"{}", "not a safetensors file"),
        (cut, "cut off: it has "),
        (within_the_header, "cut off within its header, at 40 bytes"),
        (lambda raw: raw + b"\0", "damaged: it has "),
        (header([]), "not a safetensors file"),
        (header({EMBEDDING: 1}), "not a safetensors file"),
        (header({EMBEDDING: {"dtype": "F32", "shape": [2]}}), "not a safetensors file"),
        (header({EMBEDDING: {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, 4), "not a safetensors file"),
        (header({EMBEDDING: {"dtype": "F32", "shape": [0], "data_offsets": [4, 0]}}, 4), "not a safetensors file"),
        (header({EMBEDDING: {"dtype": "F32", "shape": ["a"], "data_offsets": [0, 4]}}, 4), "not a safetensors file"),
    ],
)  # fmt: skip
def test_a_shard_that_cannot_be_loaded_is_named(tmp_path: Path, damage: Callable[[bytes], bytes], says: str) -> None:
    model = write_base(tmp_path)
    (model / SHARD).write_bytes(damage((model / SHARD).read_bytes()))
    (line,) = said(model)
    assert line.startswith(f"{model / SHARD}: {says}")
    assert embedding_rows(model) is None


def test_no_weights_are_read(tmp_path: Path) -> None:
    """The shard has 128 GiB, which are a hole in the file."""
    rows = 2**33
    model = write_base(tmp_path)
    raw = json.dumps({EMBEDDING: {"dtype": "BF16", "shape": [rows, 8], "data_offsets": [0, rows * 16]}}).encode()
    (model / SHARD).write_bytes(len(raw).to_bytes(8, "little") + raw)
    os.truncate(model / SHARD, 8 + len(raw) + rows * 16)
    assert embedding_rows(model) == rows
    assert list(file_mistakes(model, {EMBEDDING: (rows, 8)})) == []


def test_each_fault_of_an_index_is_named(tmp_path: Path) -> None:
    where = in_two_shards(tmp_path)
    moved = {**where, "lm_head.weight": FIRST, "model.norm.weight": FIRST}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": moved}))
    assert said(tmp_path) == [
        f"{tmp_path / INDEX}: lm_head.weight, model.norm.weight are not in {FIRST}, where it says; copy the model "
        "directory again"
    ]
    for broken in ("", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'):
        (tmp_path / INDEX).write_text(broken)
        (line,) = said(tmp_path)
        assert line.startswith(f"{tmp_path / INDEX}: ")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": where}))
    (tmp_path / SECOND).unlink()
    assert said(tmp_path) == [f"{tmp_path / INDEX}: names {SECOND}, not in this folder; copy the model directory again"]


@pytest.mark.parametrize("elsewhere", ["shards/model-3.safetensors", "../model-3.safetensors"])
def test_a_shard_in_another_folder_is_refused_for_sglang_would_leave_it_out(tmp_path: Path, elsewhere: str) -> None:
    model = tmp_path / "model"
    where = in_two_shards(model)
    (model / elsewhere).parent.mkdir(exist_ok=True)
    (model / SECOND).rename(model / elsewhere)
    moved = {name: elsewhere if file == SECOND else file for name, file in where.items()}
    (model / INDEX).write_text(json.dumps({"weight_map": moved}))
    assert said(model) == [f"{model / INDEX}: names {elsewhere}, not in this folder; copy the model directory again"]


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (("pytorch_model.bin",), "no *.safetensors here, only weights of another format; convert the base's weights"),
        (("base.gguf",), "no *.safetensors here, only weights of another format"),
        ((), "no *.safetensors here (the weights); copy the whole model directory there"),
        ((INDEX,), f"lacks all *.safetensors (the weights) that {INDEX} names"),
    ],
)
def test_a_base_without_safetensors_says_what_it_has(tmp_path: Path, files: tuple[str, ...], says: str) -> None:
    (write_base(tmp_path) / SHARD).unlink()
    for file in files:
        (tmp_path / file).write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    (line,) = said(tmp_path)
    assert line.startswith(f"{tmp_path}: {says}")


def test_a_weight_that_is_missing_twice_there_of_another_shape_or_quantised_is_named(tmp_path: Path) -> None:
    shapes: dict[str, Any] = weight_shapes(write_base(tmp_path))
    write_shard(tmp_path / SHARD, {name: shape for name, shape in shapes.items() if name != EMBEDDING})
    assert said(tmp_path) == [
        f"{tmp_path}: no {EMBEDDING} in {SHARD}, so SGLang would serve numbers at random; give a whole model in the "
        "layout of Hugging Face"
    ]
    write_shard(tmp_path / SHARD, {**shapes, EMBEDDING: (13, 8)})
    assert said(tmp_path) == [
        f"{tmp_path}: {EMBEDDING} has shape [13, 8], and config.json asks for [12, 8]; copy config.json and weights "
        "of one model"
    ]
    write_shard(tmp_path / SHARD, shapes, "F8_E4M3")
    (line,) = said(tmp_path)
    assert "stored as F8_E4M3, and config.json tells of no quantisation; give the unquantised base" in line
    write_shard(tmp_path / SHARD, shapes)
    write_shard(tmp_path / "another.safetensors", {EMBEDDING: (12, 8)})
    assert said(tmp_path) == [
        f"{tmp_path}: {EMBEDDING} is in another.safetensors and in {SHARD}, and SGLang would load both; keep only the "
        "files of this model"
    ]
    (tmp_path / "another.safetensors").rename(tmp_path / "consolidated.safetensors")
    assert said(tmp_path) == [], "SGLang leaves it out"


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe{}", b"version https://git-lfs.github.com/spec/v1"])
def test_a_json_file_that_is_none_is_blamed_by_its_own_name(tmp_path: Path, name: str, content: bytes) -> None:
    (write_base(tmp_path) / name).write_bytes(content)
    (line,) = said(tmp_path)
    assert line.startswith(f"{tmp_path / name}: ")
    assert line.endswith("; copy the model directory again")


def test_a_file_that_sglang_does_not_load_changes_no_fingerprint(tmp_path: Path) -> None:
    before = BaseFingerprint.of(write_base(tmp_path / "one"))
    write_shard(tmp_path / "one" / "consolidated.safetensors", {"tok_embeddings.weight": (1, 1)})
    assert BaseFingerprint.of(tmp_path / "one") == before
    in_two_shards(tmp_path / "two")
    before = BaseFingerprint.of(tmp_path / "two")
    write_shard(tmp_path / "two" / "adapter_model.safetensors", {"x": (1, 1)})
    assert BaseFingerprint.of(tmp_path / "two") == before
    assert [path.name for path in weight_files(tmp_path / "two")] == [FIRST, SECOND]


@pytest.mark.parametrize(
    ("config", "generation", "counts"),
    [
        ({"eos_token_id": 2}, {"eos_token_id": [2, 7]}, True),
        ({}, {"eos_token_id": 7}, True),
        ({"eos_token_id": [2, 7]}, {"eos_token_id": 7, "temperature": 0.6}, False),
        ({"eos_token_id": 2}, {"temperature": 0.6, "top_p": 0.9}, False),
    ],
)
def test_the_ends_of_answers_are_in_the_fingerprint_and_the_sampling_is_not(
    tmp_path: Path, config: dict[str, Any], generation: dict[str, Any], counts: bool
) -> None:
    before = BaseFingerprint.of(write_base(tmp_path, **config))
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    after = BaseFingerprint.of(tmp_path)
    assert (after.config != before.config) == counts
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"generation_config\.json: not a JSON object"):
        BaseFingerprint.of(tmp_path)


def test_a_packed_base_has_bytes_and_scales_for_each_linear_layer(tmp_path: Path) -> None:
    recipe = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    }  # fmt: skip
    shapes = weight_shapes(write_base(tmp_path, quantization_config=recipe))
    weight = "model.layers.0.mlp.up_proj.weight"
    assert (shapes[weight], shapes[f"{weight}.absmax"], shapes[EMBEDDING]) == ((64, 1), (2,), (12, 8))
    assert f"{weight}.quant_state.bitsandbytes__nf4" in shapes
    assert said(tmp_path) == []
    write_shard(tmp_path / SHARD, {name: shape for name, shape in shapes.items() if name != f"{weight}.nested_absmax"})
    (line,) = said(tmp_path)
    assert line.startswith(f"{tmp_path}: no {weight}.nested_absmax in {SHARD}")
    write_shard(tmp_path / SHARD, shapes, packed="BF16")
    (line,) = said(tmp_path)
    assert "config.json says that weights are packed in 4 bits, and " in line
    assert "stored as BF16; remove quantization_config from config.json, or copy the packed directory again" in line
    write_shard(tmp_path / SHARD, shapes)
    write_config(tmp_path)
    (line,) = said(tmp_path)
    assert "so its weights are packed in 4 bits, and config.json lacks their quantization_config; copy config" in line
