"""`fused`: a real tiny model whose parameters are laid out and named as SGLang does it."""

from pathlib import Path

import torch
import transformers


def fused(model: Path, dtype: torch.dtype = torch.float32, padding: int = 64) -> torch.nn.Module:
    """Return a model's parameters under SGLang's names: q, k, v and gate, up by rows in one, the vocabulary padded."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    source = {name: weight.detach() for name, weight in theirs.named_parameters()}
    served: dict[str, torch.Tensor] = {}
    for name, weight in source.items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            served[name] = torch.cat([weight, torch.full((padding, weight.shape[1]), 7.0, dtype=dtype)])
        elif ".q_proj." in name:
            parts = [source[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            served[_wrapped(name.replace("q_proj", "qkv_proj"))] = torch.cat(parts)
        elif ".gate_proj." in name:
            parts = [weight, source[name.replace("gate_proj", "up_proj")]]
            served[_wrapped(name.replace("gate_proj", "gate_up_proj"))] = torch.cat(parts)
        elif not any(f".{part}." in name for part in ("k_proj", "v_proj", "up_proj")):
            served[_wrapped(name)] = weight.clone()
    root = torch.nn.Module()
    for name, weight in served.items():
        put(root, name, weight)
    return root


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
