"""An adapter that peft has saved computes the same after `umbel.peft_import` has read it: every form that is folded."""

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from umbel import peft_dir, peft_import
from umbel.base.shapes import LINEARS, linear_shapes

TOKENS = torch.arange(3, 43).reshape(2, 20)
LAYER = r"model\.layers\.0\.self_attn\.q_proj"
FORMS: dict[str, dict[str, Any]] = {
    "alpha is not r": {"lora_alpha": 12},
    "rsLoRA": {"use_rslora": True, "lora_alpha": 3},
    "ranks by pattern": {"rank_pattern": {LAYER: 2, "down_proj": 7}},
    "alphas by pattern": {"alpha_pattern": {r".*\.1\.mlp\.(up|gate)_proj": 32, "q_proj": 1}},
    "patterns of both, rsLoRA": {
        "rank_pattern": {"q_proj|v_proj": 3}, "alpha_pattern": {"0.self_attn.q_proj": 5}, "use_rslora": True,
    },
    "a path in full matches its own layer only": {"alpha_pattern": {"model.layers.1.self_attn.o_proj": 40}},
    "the first pattern that matches": {"alpha_pattern": {"q_proj": 2, r"layers\.0\.self_attn\.q_proj": 64}},
    "the end of a name is not the name": {"alpha_pattern": {"proj": 64}, "rank_pattern": {"_proj": 2}},
    "query and value only": {"target_modules": ["q_proj", "v_proj"]},
    "query only": {"target_modules": ["q_proj"]},
    "up without gate": {"target_modules": ["up_proj", "o_proj"]},
    "one layer": {"layers_to_transform": [1]},
    "one layer, by its number": {"layers_to_transform": 0, "layers_pattern": "layers"},
    "modules by a pattern": {"target_modules": r".*\.1\..*_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "without some": {"exclude_modules": ["down_proj", "model.layers.0.self_attn.k_proj"]},
    "gaussian start": {"init_lora_weights": "gaussian"},
}  # fmt: skip


def saved(base: Path, folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """Save an adapter of random factors with peft."""
    settings = {"r": 4, "lora_alpha": 4, "target_modules": list(LINEARS), "task_type": "CAUSAL_LM", **settings}
    torch.manual_seed(0)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(str(folder))
    if dtype is not torch.float32:
        weights = {name: tensor.to(dtype) for name, tensor in load_file(folder / peft_dir.WEIGHTS).items()}
        save_file(weights, folder / peft_dir.WEIGHTS, {"format": "pt"})
    return folder


def logits(base: Path, adapter: Path | None) -> np.ndarray:
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(base)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return np.asarray(model(TOKENS).logits)


def canonical(base: Path, adapter: Path, into: Path, **options: Any) -> Path:
    """Write what `read` makes of a directory, as the site does."""
    imported = peft_import.read(adapter, linear_shapes(base, LINEARS), 8, LINEARS, **options)
    peft_dir.validate(imported.tensors, linear_shapes(base, LINEARS), rank=imported.rank, max_rank=8)
    config = peft_dir.encode_settings(rank=imported.rank, target_modules=LINEARS, base=str(base))
    peft_dir.place(into, {peft_dir.WEIGHTS: peft_dir.encode(imported.tensors), peft_dir.CONFIG: config})
    return into


@pytest.mark.parametrize("form", FORMS)
def test_the_same_logits_as_with_the_original(tiny_llama: Path, tmp_path: Path, form: str) -> None:
    original = saved(tiny_llama, tmp_path / "original", **FORMS[form])
    expected = logits(tiny_llama, original)
    assert np.abs(expected - logits(tiny_llama, None)).max() > 0.1, "the adapter changes something"
    read = logits(tiny_llama, canonical(tiny_llama, original, tmp_path / "canonical"))
    np.testing.assert_allclose(read, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_sixteen_bits(tiny_llama: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    original = saved(tiny_llama, tmp_path / "original", dtype, lora_alpha=6)
    read = logits(tiny_llama, canonical(tiny_llama, original, tmp_path / "canonical"))
    np.testing.assert_allclose(read, logits(tiny_llama, original), rtol=1e-4, atol=1e-4)


def test_rows_that_are_filled_for_training_change_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    original = saved(tiny_llama, tmp_path / "original", rank_pattern={"q_proj": 2}, target_modules=["q_proj", "o_proj"])
    filled = canonical(tiny_llama, original, tmp_path / "filled", fill=np.random.default_rng(0))
    factors = peft_dir.factors(peft_dir.decode((filled / peft_dir.WEIGHTS).read_bytes()))
    assert all((a != 0).all() for a, _ in factors.values()), "no row is without a gradient for B"
    np.testing.assert_allclose(logits(tiny_llama, filled), logits(tiny_llama, original), rtol=1e-4, atol=1e-4)


def test_a_version_of_umbel_is_read_as_it_is(tiny_llama: Path, tmp_path: Path) -> None:
    first = canonical(tiny_llama, saved(tiny_llama, tmp_path / "original", lora_alpha=9), tmp_path / "once")
    again = canonical(tiny_llama, first, tmp_path / "twice")
    assert (again / peft_dir.WEIGHTS).read_bytes() == (first / peft_dir.WEIGHTS).read_bytes()
