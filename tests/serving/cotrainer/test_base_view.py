"""Hugging Face models over SGLang's parameters: the same numbers, the same memory, and no view of what cannot be."""

from pathlib import Path

import pytest
import torch
import transformers

from serving.cotrainer.base_view import view_of
from serving.cotrainer.quantum import Pieces
from serving.cotrainer.trainer import LoraTrainer
from tests.toys.serving.served_model import fused, put
from umbel.base.shapes import LINEARS
from umbel.errors import UnsupportedModel

FAMILIES = ("tiny_llama", "tiny_mistral", "tiny_qwen2", "tiny_qwen3")
LAYER = "model.layers.1"


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


def test_the_stand_in_is_laid_out_as_the_families_differ(model: Path) -> None:
    """Guards the other tests: biases of Qwen2, norms of Qwen3, tied and untied embeddings are all there."""
    names = dict(fused(model).named_parameters())
    assert (f"{LAYER}.self_attn.qkv_proj.base_layer.bias" in names) == (model.name == "qwen2")
    assert (f"{LAYER}.self_attn.q_norm.weight" in names) == (model.name == "qwen3")
    assert ("lm_head.weight" in names) == (model.name in ("llama", "mistral"))
    assert not any(part in name for name in names for part in (".q_proj", ".k_proj", ".v_proj", ".up_proj"))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_equal_those_of_transformers(model: Path, dtype: torch.dtype) -> None:
    ids = torch.randint(8, 400, (2, 12), generator=torch.Generator().manual_seed(0))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    ours = view_of(fused(model, dtype), str(model))
    assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)


def test_every_parameter_is_a_view_of_the_served_one(model: Path) -> None:
    served = fused(model)
    storages = {weight.untyped_storage().data_ptr() for weight in served.parameters()}
    view = view_of(served, str(model))
    seen = dict(view.named_parameters())
    assert len(seen) >= 20
    for name, weight in seen.items():
        assert weight.untyped_storage().data_ptr() in storages, name
        assert not weight.requires_grad, name
        assert weight.is_contiguous(), name
    assert {weight.untyped_storage().data_ptr() for weight in seen.values()} == storages, "none is left out"


@torch.no_grad()
def test_a_change_of_the_served_weights_is_a_change_of_the_view(model: Path) -> None:
    served = fused(model)
    view = view_of(served, str(model))
    layer = view.get_submodule(LAYER)
    for fused_name, parts in (
        ("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
    ):
        weight = served.get_parameter(f"{LAYER}.{fused_name}.base_layer.weight")
        for row in range(weight.shape[0]):
            weight[row] = row
        rows = torch.cat([layer.get_submodule(part).weight[:, 0] for part in parts])
        assert torch.equal(rows, torch.arange(weight.shape[0], dtype=rows.dtype)), "each row once, in order"


def test_tied_embeddings_stay_tied_and_padding_of_the_vocabulary_is_out_of_view(model: Path) -> None:
    served = fused(model, padding=64)
    view = view_of(served, str(model))
    rows = view.config.vocab_size
    assert served.get_parameter("model.embed_tokens.weight").shape[0] == rows + 64
    assert view.lm_head.weight.shape[0] == view.model.embed_tokens.weight.shape[0] == rows
    tied = view.lm_head.weight.data_ptr() == view.model.embed_tokens.weight.data_ptr()
    assert tied == bool(view.config.tie_word_embeddings) == (model.name in ("qwen2", "qwen3"))


def test_the_trainers_frozen_parameters_are_still_the_served_ones(model: Path) -> None:
    """Putting LoRA into the view copies nothing either."""
    served = fused(model)
    storages = {weight.untyped_storage().data_ptr() for weight in served.parameters()}
    trainer = LoraTrainer(
        view_of(served, str(model)), max_rank=4, target_modules=LINEARS, seq_len=8, pieces=Pieces.whole(1, 8)
    )
    for _ in trainer.warm_up():
        pass
    now = {name: weight for name, weight in trainer.model.named_parameters() if "lora_" not in name}
    assert now
    assert all(weight.untyped_storage().data_ptr() in storages for weight in now.values())


def test_a_family_that_cannot_be_viewed_is_refused_by_name(tmp_path: Path) -> None:
    transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="cannot view 'gpt2'; it views llama, mistral, qwen2, qwen3"):
        view_of(torch.nn.Module(), str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.float8_e4m3fn])
@pytest.mark.parametrize("name", ["self_attn.qkv_proj.base_layer.weight", "mlp.down_proj.base_layer.weight"])
def test_a_quantised_weight_is_refused_by_name(tiny_llama: Path, name: str, dtype: torch.dtype) -> None:
    served = fused(tiny_llama)
    put(served, f"{LAYER}.{name}", served.get_parameter(f"{LAYER}.{name}").detach().to(dtype))
    with pytest.raises(UnsupportedModel, match=rf"{LAYER}\..*{dtype}.*of quantised weights only"):
        view_of(served, str(tiny_llama))


@pytest.mark.parametrize(
    ("name", "hugging_face"),
    [
        ("self_attn.o_proj.base_layer.weight", "self_attn.o_proj.weight"),
        ("self_attn.qkv_proj.base_layer.weight", "self_attn.v_proj.weight"),
        ("mlp.gate_up_proj.base_layer.weight", "mlp.up_proj.weight"),
    ],
)
def test_a_sharded_or_packed_weight_is_refused_by_name(tiny_llama: Path, name: str, hugging_face: str) -> None:
    served = fused(tiny_llama)
    whole = served.get_parameter(f"{LAYER}.{name}").detach()
    put(served, f"{LAYER}.{name}", whole[: len(whole) - 8].clone())
    with pytest.raises(UnsupportedModel, match=f"^{LAYER}.{hugging_face}: the engine holds"):
        view_of(served, str(tiny_llama))


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        ("model.embed_tokens", "model.embed_tokens.weight"),
        ("model.norm", "model.norm.weight"),
        ("lm_head", "lm_head.weight"),
        (f"{LAYER}.mlp.gate_up_proj.base_layer", f"{LAYER}.mlp.gate_up_proj.weight"),
        (f"{LAYER}.input_layernorm", f"{LAYER}.input_layernorm.weight"),
    ],
)
def test_a_missing_weight_is_refused_by_name(tiny_llama: Path, missing: str, named: str) -> None:
    served = fused(tiny_llama)
    del served.get_submodule(missing).weight
    with pytest.raises(UnsupportedModel, match=f"^{named}: the engine has no such weight"):
        view_of(served, str(tiny_llama))
