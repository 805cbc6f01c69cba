"""Tiny bases: real Hugging Face directories of each family that umbel views."""

import hashlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from umbel.base.fingerprint import BaseFingerprint
from umbel.base.shapes import linear_shapes


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_loads_and_talks(family: str, request: pytest.FixtureRequest) -> None:
    transformers = pytest.importorskip("transformers")
    path: Path = request.getfixturevalue(f"tiny_{family}")
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    weights = dict(model.named_parameters())

    assert model.config.model_type == family
    assert model.config.tie_word_embeddings == family.startswith("qwen")
    for module, shape in linear_shapes(path, ("q_proj", "v_proj", "o_proj", "down_proj")).items():
        assert tuple(weights[f"{module}.weight"].shape) == shape
    biases = [value for name, value in weights.items() if name.endswith(".bias")]
    assert len(biases) == (6 if family == "qwen2" else 0)
    assert all(bias.abs().min() > 0 for bias in biases)
    assert any("q_norm" in name for name in weights) == (family == "qwen3")
    assert all(value.std() > 0.01 for name, value in weights.items() if "norm" in name)

    turns = [{"role": "user", "content": "Größe: 3"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>Größe: 3<|end|><|assistant|>"
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    assert tokenizer.decode(ids["input_ids"][0]) == text
    assert model.generate(**ids, max_new_tokens=4, do_sample=False).shape[1] > ids["input_ids"].shape[1]


def test_greedy_choices_are_clear(tiny_llama: Path) -> None:
    """Top two logits are far apart, in comparison with rounding: tests that compare tokens rely on it."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        top = model(torch.arange(10, 60)[None]).logits[0].topk(2).values
    assert (top[:, 0] - top[:, 1]).median() > 0.05


def test_same_recipe_same_base_and_no_work_twice(tiny_base: ModuleType, tmp_path: Path) -> None:
    recipe = replace(tiny_base.TINY, steps=2)
    first, second = (tiny_base.build(tmp_path / name, recipe) for name in ("one", "two"))
    assert BaseFingerprint.of(first) == BaseFingerprint.of(second)
    before = (first / "model.safetensors").stat().st_mtime_ns
    assert tiny_base.build(first, recipe) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == before
    weights = hashlib.sha256((first / "model.safetensors").read_bytes())
    tiny_base.build(first, replace(recipe, seed=1))
    assert hashlib.sha256((first / "model.safetensors").read_bytes()).digest() != weights.digest()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
