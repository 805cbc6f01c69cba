"""The frozen base: a fingerprint that names the part that differs, and the shapes of its linear layers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from umbel.base.fingerprint import BaseFingerprint
from umbel.base.packed import packing_of
from umbel.base.shapes import FAMILIES, LINEARS, linear_shapes, read_config
from umbel.errors import BaseMismatch, ConfigError, UnsupportedModel

CONFIG: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": 3, "vocab_size": 512,
}  # fmt: skip
PARTS = ("weights", "config", "quantization", "tokenizer", "chat_template")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory with the files that count; their content does not matter here."""
    made = tmp_path / "model"
    made.mkdir()
    write_config(made)
    for name in ("model-00001.safetensors", "model-00002.safetensors", "tokenizer.json", "chat_template.jinja"):
        (made / name).write_text(f"content of {name}")
    return made


def write_config(model: Path, **changes: object) -> None:
    (model / "config.json").write_text(json.dumps({**CONFIG, **changes}))


def changed(model: Path, tmp_path: Path, file: str, content: str | None) -> BaseFingerprint:
    """The fingerprint of a copy in which one file is different (None: missing)."""
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    (copy / file).unlink(missing_ok=True)
    if content is not None:
        (copy / file).write_text(content)
    return BaseFingerprint.of(copy)


CHANGES: list[tuple[str, str | None, str]] = [
    ("model-00002.safetensors", "other", "weights"),
    ("model-00002.safetensors", None, "weights"),
    ("model-00003.safetensors", "one more", "weights"),
    ("config.json", json.dumps({**CONFIG, "rms_norm_eps": 1e-5}), "config"),
    ("config.json", json.dumps({**CONFIG, "quantization_config": {"quant_method": "awq"}}), "quantization"),
    ("tokenizer.json", "other", "tokenizer"),
    ("tokenizer_config.json", "{}", "tokenizer"),
    ("merges.txt", "a b", "tokenizer"),
    ("chat_template.jinja", "other", "chat_template"),
    ("chat_template.jinja", None, "chat_template"),
]


@pytest.mark.parametrize(("file", "content", "part"), CHANGES)
def test_the_part_that_differs_is_named_and_only_it(
    model: Path, tmp_path: Path, file: str, content: str | None, part: str
) -> None:
    here, there = BaseFingerprint.of(model), changed(model, tmp_path, file, content)
    assert [name for name in PARTS if getattr(here, name) != getattr(there, name)] == [part]
    assert here.digest != there.digest
    with pytest.raises(BaseMismatch, match=f"^clinic-b holds another base than clinic-a: {part} differ;"):
        here.require_same(there, here="clinic-a", there="clinic-b")


def test_every_part_has_a_change_that_shows_it() -> None:
    assert {part for _, _, part in CHANGES} == set(BaseFingerprint.model_fields)


def test_all_parts_that_differ_are_named(model: Path, tmp_path: Path) -> None:
    (model / "tokenizer.json").write_text("other")
    there = changed(model, tmp_path, "config.json", json.dumps({**CONFIG, "vocab_size": 9}))
    (model / "tokenizer.json").write_text("as before")
    with pytest.raises(BaseMismatch, match=": config, tokenizer differ;"):
        BaseFingerprint.of(model).require_same(there, here="a", there="b")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", json.dumps(dict(reversed(CONFIG.items())))),
        ("config.json", json.dumps({**CONFIG, "dtype": "bfloat16", "transformers_version": "9", "use_cache": False})),
        ("config.json", json.dumps({**CONFIG, "torch_dtype": "float32", "_name_or_path": "/elsewhere"}, indent=4)),
        ("README.md", "a model card"),
        ("generation_config.json", "{}"),
    ],
)
def test_what_changes_nothing_changes_no_fingerprint(model: Path, tmp_path: Path, file: str, content: str) -> None:
    here, there = BaseFingerprint.of(model), changed(model, tmp_path, file, content)
    assert here == there
    here.require_same(there, here="a", there="b")


def test_shapes_come_in_layer_order_and_only_for_the_asked_modules(model: Path) -> None:
    shapes = linear_shapes(model, ("v_proj", "down_proj", "q_proj"))
    names = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    assert list(shapes) == [f"model.layers.{layer}.{name}" for layer in range(3) for name in names]
    assert list(shapes.values())[:3] == [(64, 64), (32, 64), (64, 160)]


@pytest.mark.parametrize(
    ("changes", "q", "k"),
    [
        ({"head_dim": 32}, (128, 64), (64, 64)),
        ({"head_dim": None}, (64, 64), (32, 64)),
        ({"num_key_value_heads": None}, (64, 64), (64, 64)),
    ],
)
def test_head_width_and_shared_heads_are_respected(
    model: Path, changes: dict[str, Any], q: tuple[int, int], k: tuple[int, int]
) -> None:
    write_config(model, **changes)
    shapes = linear_shapes(model, LINEARS)
    attention = "model.layers.0.self_attn"
    assert (shapes[f"{attention}.q_proj"], shapes[f"{attention}.k_proj"]) == (q, k)
    assert shapes[f"{attention}.o_proj"] == q[::-1]


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "Llama", "", None])
def test_an_unknown_family_is_refused_by_name_with_the_known_ones(model: Path, family: str | None) -> None:
    write_config(model, model_type=family)
    with pytest.raises(UnsupportedModel, match=f"model_type {family!r} is not supported; known: llama, mistral"):
        BaseFingerprint.of(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_known_family_is_read(model: Path, family: str) -> None:
    write_config(model, model_type=family)
    assert read_config(model)["model_type"] == family


def test_a_directory_without_config_or_weights_says_what_is_missing(model: Path) -> None:
    for shard in model.glob("*.safetensors"):
        shard.rename(shard.with_suffix(".bin"))
    with pytest.raises(ConfigError, match=r"no .*safetensors here, only weights of another format; convert"):
        BaseFingerprint.of(model)
    (model / "config.json").unlink()
    with pytest.raises(ConfigError, match="no base model here; expected a Hugging Face model directory"):
        BaseFingerprint.of(model)


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_config_that_is_no_json_object_is_a_config_error(model: Path, content: str) -> None:
    (model / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_config(model)


NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize(
    ("recipe", "packing"),
    [(None, ""), ({"quant_method": "awq", "bits": 4}, ""), (NF4, "nf4"), ({**NF4, "bnb_4bit_quant_type": "fp4"}, "fp4"),
     ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "fp4")],
)  # fmt: skip
def test_a_config_says_what_the_linear_layers_are_packed_in(recipe: object, packing: str) -> None:
    assert packing_of({**CONFIG, "quantization_config": recipe}) == packing
    assert packing_of(CONFIG) == ""


def test_a_base_without_a_quantization_is_dense_and_kin_leaves_the_quantization_out(model: Path) -> None:
    dense = BaseFingerprint.of(model)
    write_config(model, quantization_config=NF4)
    packed = BaseFingerprint.of(model)
    assert (dense.dense, packed.dense) == (True, False)
    assert dense.digest != packed.digest
    assert dense.kin == packed.kin
    (model / "tokenizer.json").write_text("other")
    assert BaseFingerprint.of(model).kin != dense.kin
