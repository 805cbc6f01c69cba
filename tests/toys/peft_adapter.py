"""A base without tensors that anyone multiplies, whose layers are the toy site's, and a PEFT directory for it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from tests.toys.site import SHAPES
from umbel import peft_dir

CONFIG = {
    "model_type": "llama", "hidden_size": 5, "intermediate_size": 7, "num_attention_heads": 3, "head_dim": 2,
    "num_key_value_heads": 2, "num_hidden_layers": 1, "vocab_size": 11,
}  # fmt: skip
MODULES = ("q_proj", "v_proj")
RANK, ALPHA = 2, 4


def base(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    safetensors.numpy.save_file({"model.norm.weight": np.ones(5, np.float32)}, folder / "model.safetensors")
    return folder


def factors() -> peft_dir.Tensors:
    """Random factors of rank 2; all modules."""
    draw = np.random.default_rng(3)
    tensors: peft_dir.Tensors = {}
    for module, (out_features, in_features) in SHAPES.items():
        tensors[peft_dir.key(module, "A")] = draw.standard_normal((RANK, in_features)).astype(np.float32)
        tensors[peft_dir.key(module, "B")] = 0.1 * draw.standard_normal((out_features, RANK)).astype(np.float32)
    return tensors


def peft(folder: Path, **changes: Any) -> Path:
    """Write the adapter as peft saves it: its alpha is twice its rank."""
    folder.mkdir()
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(MODULES),
        "bias": "none",
    }  # fmt: skip
    (folder / peft_dir.CONFIG).write_text(json.dumps({**settings, **changes}))
    (folder / peft_dir.WEIGHTS).write_bytes(peft_dir.encode(factors()))
    return folder
