"""A PEFT directory as an operator has one from elsewhere, for the base of tests/toys/deployment.py."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.toys.deployment import SHAPES
from umbel import peft_dir


def peft_directory(folder: Path, seed: int = 0, *, alpha: int = 8, rank: int = 2, value: float | None = None) -> Path:
    """Write an adapter of query and value, in bfloat16's range unless one number has another `value`."""
    draw = np.random.default_rng(seed)
    tensors: peft_dir.Tensors = {}
    for module, (out, inner) in SHAPES.items():
        tensors[peft_dir.key(module, "A")] = draw.standard_normal((rank, inner)).astype(np.float32)
        tensors[peft_dir.key(module, "B")] = draw.standard_normal((out, rank)).astype(np.float32)
        if value is not None:
            tensors[peft_dir.key(module, "B")][0, 0] = value
    settings: dict[str, Any] = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha,
        "target_modules": ["q_proj", "v_proj"],
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / peft_dir.CONFIG).write_text(json.dumps(settings))
    (folder / peft_dir.WEIGHTS).write_bytes(peft_dir.encode(tensors))
    return folder


def digest_of(folder: Path, *, alpha: int = 8, rank: int = 2) -> str:
    """Return the digest of an adapter as a float32 engine loads it, computed apart from the code under test."""
    tensors = peft_dir.decode((folder / peft_dir.WEIGHTS).read_bytes())
    scaled = {name: array * (np.float32(alpha / rank) if "lora_B" in name else 1) for name, array in tensors.items()}
    return peft_dir.digest(peft_dir.encode({name: array.astype(np.float32) for name, array in scaled.items()}))
