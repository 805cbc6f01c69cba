"""`fused`: a real tiny model whose parameters are laid out and named as SGLang does it."""

import copy
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import transformers

from serving.four_bit.weight import OFFSETS, STATES

PARTS = {
    "q_proj": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "gate_proj": ("gate_up_proj", ("gate_proj", "up_proj")),
}
"""First of the layers that SGLang fuses → the fused one, and all of them in its order."""


def fused(model: Path, dtype: torch.dtype = torch.float32, padding: int = 64) -> torch.nn.Module:
    """Return a model's parameters under SGLang's names: q, k, v and gate, up by rows in one, the vocabulary padded."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    source = {name: weight.data for name, weight in theirs.named_parameters()}
    states = {n: w.quant_state for n, w in theirs.named_parameters() if getattr(w, "quant_state", None) is not None}
    root = torch.nn.Module()
    for name, weight in source.items():
        part = name.split(".")[-2]
        if part in ("k_proj", "v_proj", "up_proj"):
            continue
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            put(root, name, torch.cat([weight, torch.full((padding, weight.shape[1]), 7.0, dtype=dtype)]))
            continue
        into, parts = PARTS.get(part, (part, (part,)))
        names = [name.replace(part, one) for one in parts]
        wrapped = _wrapped(name.replace(part, into))
        put(root, wrapped, torch.cat([source[one] for one in names]))
        if name in states:
            pack(root.get_parameter(wrapped), [states[one] for one in names], [len(source[one]) for one in names])
    return root


def pack(parameter: torch.nn.Parameter, states: list[Any], lengths: list[int]) -> None:
    """Say of bytes in a row, `lengths` of each part, what SGLang's loader of bitsandbytes says of them."""
    setattr(parameter, STATES, {number: copy.deepcopy(state) for number, state in enumerate(states)})
    setattr(parameter, OFFSETS, torch.tensor([0, *accumulate(lengths)]))


def _wrapped(name: str) -> str:
    """Return the name of a weight inside SGLang's LoRA layer, which holds the base's in `base_layer`."""
    module, leaf = name.rsplit(".", 1)
    return f"{module}.base_layer.{leaf}" if module.endswith("_proj") else name


def put(root: torch.nn.Module, name: str, weight: torch.Tensor) -> None:
    """Set a parameter by its dotted name; an older one is replaced."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in dict(root.named_children()):
            root.add_module(part, torch.nn.Module())
        root = root.get_submodule(part)
    setattr(root, leaf, torch.nn.Parameter(weight, requires_grad=False))
