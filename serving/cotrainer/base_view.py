"""`view_of`: a Hugging Face model whose frozen parameters are views of SGLang's weights, of the very same storage.

SGLang fuses q, k, v and gate, up by rows, so each Hugging Face weight is a contiguous row range of a fused one; in
4 bits, it is a run of bytes. The model is built on the meta device and its parameters replaced by those views: nothing
is copied, nothing is allocated.
"""

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from serving.four_bit.linear import FourBitLinear
from serving.four_bit.weight import STATES, FourBitWeight
from umbel.base.shapes import FAMILIES
from umbel.errors import UnsupportedModel

FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
"""Hugging Face's module → SGLang's module that holds its rows, in the order of the rows."""


def view_of(served: torch.nn.Module, model_path: str) -> PreTrainedModel:
    """Return a Hugging Face causal LM over the parameters of `served`, SGLang's model of the same directory.

    Raises UnsupportedModel, with the name, for a family, a layout or a weight that cannot be viewed.
    """
    config = AutoConfig.from_pretrained(model_path)
    if config.model_type not in FAMILIES:
        raise UnsupportedModel(f"{model_path}: umbel cannot view {config.model_type!r}; it views {', '.join(FAMILIES)}")
    weights = {name.replace(".base_layer", ""): weight for name, weight in served.named_parameters()}
    embedding = _require(weights, "model.embed_tokens.weight")
    with torch.device("meta"):
        model = cast(Any, AutoModelForCausalLM).from_config(config, dtype=embedding.dtype, attn_implementation="sdpa")
    for name, parameter in list(model.named_parameters()):
        module, leaf = name.rsplit(".", 1)
        packed = weights.get(_fused(name)) if leaf == "weight" else None
        if packed is not None and hasattr(packed, STATES):
            model.set_submodule(module, _linear(name, parameter.shape, packed))
            continue
        view = _source(name, parameter.shape, weights, config)
        setattr(model.get_submodule(module), leaf, torch.nn.Parameter(view, requires_grad=False))
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    # Buffers of rotary embeddings are computed and not stored, so they are made anew: a few hundred numbers.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(embedding.device)
    _require_no_meta(model)
    return cast(PreTrainedModel, model.eval())


def frozen_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return all that the base of a view consists of: its parameters, and of a weight in 4 bits each tensor."""
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters())
    for name, module in model.named_modules():
        if isinstance(module, FourBitLinear):
            tensors |= {f"{name}.{part}": tensor for part, tensor in module.four_bit.scale_tensors.items()}
    return tensors


def engine_storages(served: torch.nn.Module) -> set[int]:
    """Return where the storages of SGLang's weights begin, those of the scales of weights in 4 bits included."""
    storages = set()
    for weight in served.parameters():
        parts = [part for shard in FourBitWeight.shards(weight) for part in shard.scale_tensors.values()]
        storages |= {tensor.untyped_storage().data_ptr() for tensor in [weight, *parts]}
    return storages


def _part(name: str) -> str | None:
    """Return the module of Hugging Face's parameter `name` if SGLang fuses it with others."""
    return next((part for part in FUSED if f".{part}." in name), None)


def _fused(name: str) -> str:
    """Return the name of SGLang's parameter that holds Hugging Face's parameter `name`."""
    part = _part(name)
    return name if part is None else name.replace(part, FUSED[part])


def _linear(name: str, shape: torch.Size, parameter: torch.Tensor) -> FourBitLinear:
    """Return a layer over the bytes and scales that are Hugging Face's parameter `name`."""
    part = _part(name)
    number = 0 if part is None else [other for other in FUSED if FUSED[other] == FUSED[part]].index(part)
    weight = FourBitWeight.shard(parameter, number)
    if (
        weight.shape != tuple(shape)
        or weight.packed.dtype != torch.uint8
        or 2 * weight.packed.numel() != math.prod(shape)
    ):
        raise UnsupportedModel(
            f"{name}: the engine holds {list(weight.shape)} in {weight.packed.numel()} bytes of {weight.packed.dtype}, "
            f"not {list(shape)} in 4 bits"
        )
    return FourBitLinear(weight)


def _source(
    name: str, shape: torch.Size, weights: Mapping[str, torch.Tensor], config: PretrainedConfig
) -> torch.Tensor:
    """Return the rows of SGLang's parameter that are Hugging Face's parameter `name`."""
    part = _part(name)
    if part is not None:
        rows = _rows(config)[part]
        source = _require(weights, _fused(name))[rows]
    elif name == "lm_head.weight" and config.tie_word_embeddings:
        source = _require(weights, "model.embed_tokens.weight")[: shape[0]]
    else:
        source = _require(weights, name)[: shape[0]]  # SGLang pads the vocabulary to a multiple of 64
    if source.shape != shape or not source.is_floating_point() or source.element_size() < 2:
        raise UnsupportedModel(
            f"{name}: the engine holds {list(source.shape)} {source.dtype}, not {list(shape)} in 16 or 32 bits; "
            "of quantised weights only bitsandbytes' in 4 bits can be viewed, and none that are sharded"
        )
    return source.detach()


def _rows(config: PretrainedConfig) -> dict[str, slice]:
    """Return the rows of each part in its fused weight."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    q, kv = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    inner = config.intermediate_size
    return {
        "q_proj": slice(0, q), "k_proj": slice(q, q + kv), "v_proj": slice(q + kv, q + 2 * kv),
        "gate_proj": slice(0, inner), "up_proj": slice(inner, 2 * inner),
    }  # fmt: skip


def _require(weights: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    if name not in weights:
        raise UnsupportedModel(f"{name}: the engine has no such weight; its layout of this model cannot be viewed")
    return weights[name]


def _require_no_meta(model: torch.nn.Module) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise UnsupportedModel(f"{name}: no counterpart in the engine; this model cannot be viewed")
