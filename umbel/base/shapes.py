"""`weight_shapes`, `linear_shapes`, `base_bytes`: the tensors that a base's config.json asks for, and their size."""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from umbel.base.files import EMBEDDING, json_object
from umbel.base.packed import packed_bytes, packed_shapes, packing_of
from umbel.errors import ConfigError, UnsupportedModel

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""`model_type` of the model families that umbel can view, train and serve."""
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Linear layers of a transformer block, in layer order."""


def adaptable(names: Collection[str]) -> tuple[str, ...]:
    """Return linear layers in layer order; raise ConfigError where adapters cannot change just these."""
    unknown = [name for name in names if name not in LINEARS]
    if unknown or not names:
        raise ConfigError(f"{', '.join(unknown) or 'nothing'} cannot be adapted; choose from {', '.join(LINEARS)}")
    if {"q_proj", "k_proj", "v_proj"} & set(names) and not {"q_proj", "v_proj"} <= set(names):
        raise ConfigError("SGLang needs q_proj and v_proj together once one of q, k, v is adapted")
    return tuple(name for name in LINEARS if name in names)


def linear_shapes(model: Path, target_modules: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """Return module path → (out, in) of every linear layer that `target_modules` names, in layer order.

    Raises ConfigError or UnsupportedModel as `read_config` does.
    """
    return _linear_shapes(read_config(model), target_modules)


def _linear_shapes(config: Mapping[str, Any], target_modules: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    shapes = layer_shapes(config)
    block = {name: "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn" for name in LINEARS}
    return {
        f"model.layers.{layer}.{block[name]}.{name}": shapes[name]
        for layer in range(config["num_hidden_layers"])
        for name in LINEARS
        if name in target_modules
    }


def layer_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Return the (out, in) of each linear layer of one transformer block, from the content of a config.json."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    q, kv = heads * head_dim, (config.get("num_key_value_heads") or heads) * head_dim
    return {
        "q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q),
        "gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner),
    }  # fmt: skip


def weight_shapes(model: Path) -> dict[str, tuple[int, ...] | None]:
    """Return tensor → shape of what a base must have in its files; None: of any shape.

    Raises ConfigError or UnsupportedModel as `read_config` does.
    """
    config = read_config(model)
    packed = packing_of(config)
    shapes: dict[str, tuple[int, ...] | None] = dict(_dense_shapes(config))
    for module, shape in _linear_shapes(config, LINEARS).items():
        weight = f"{module}.weight"
        shapes |= packed_shapes(weight, shape, config) if packed else {weight: shape}
    return shapes


def base_bytes(model: Path, itemsize: int) -> tuple[int, int]:
    """Return the bytes of a base in memory, as it is and as it would be unpacked; `itemsize` is that of a number.

    Raises ConfigError or UnsupportedModel as `read_config` does.
    """
    config = read_config(model)
    linears = _linear_shapes(config, LINEARS).values()
    others = itemsize * sum(map(math.prod, _dense_shapes(config).values()))
    dense = itemsize * sum(map(math.prod, linears))
    held = sum(packed_bytes(shape, config) for shape in linears) if packing_of(config) else dense
    return others + held, others + dense


def _dense_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return tensor → shape of all but the weights of the linear layers."""
    hidden = config["hidden_size"]
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{norm}.weight"] = (hidden,)
    biased = _biased(config)
    for module, shape in _linear_shapes(config, LINEARS).items():
        if module.endswith(biased):
            shapes[f"{module}.bias"] = shape[:1]
        if config["model_type"] == "qwen3" and module.endswith(("q_proj", "k_proj")):
            head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
            shapes[f"{module.removesuffix('proj')}norm.weight"] = (head_dim,)
    return shapes


def _biased(config: dict[str, Any]) -> tuple[str, ...]:
    """Return the linear layers that add a bias."""
    if config["model_type"] == "qwen2":
        return LINEARS[:3]
    attention = LINEARS[:4] if config["model_type"] != "mistral" and config.get("attention_bias") else ()
    return attention + (LINEARS[4:] if config["model_type"] == "llama" and config.get("mlp_bias") else ())


def read_config(model: Path) -> dict[str, Any]:
    """Read the model's config.json; raise ConfigError without one, UnsupportedModel for an unknown family."""
    config_file = model / "config.json"
    if not config_file.is_file():
        raise ConfigError(f"{model}: no base model here; expected a Hugging Face model directory with config.json")
    config = json_object(config_file)
    if config.get("model_type") not in FAMILIES:
        raise UnsupportedModel(
            f"{config_file}: model_type {config.get('model_type')!r} is not supported; known: {', '.join(FAMILIES)}"
        )
    return config
