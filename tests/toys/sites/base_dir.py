"""`write_base`: a model directory to which nothing is missing, tiny, and made without any library of models."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from umbel.base.shapes import weight_shapes

CONFIG: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 16,
    "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2, "vocab_size": 12,
    "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip
BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "U8": 1}


def write_base(model: Path, **config: Any) -> Path:
    """Write config.json (with changes), tokenizer.json and one shard of zeros with all weights of it."""
    model.mkdir(parents=True, exist_ok=True)
    write_config(model, **config)
    (model / "tokenizer.json").write_text("{}")
    write_shard(model / "model.safetensors", weight_shapes(model))
    return model


def write_config(model: Path, **config: Any) -> None:
    """Write config.json with changes; None removes nothing, and stands there as null."""
    (model / "config.json").write_text(json.dumps({**CONFIG, **config}))


def write_shard(
    path: Path, shapes: Mapping[str, tuple[int, ...] | None], dtype: str = "BF16", packed: str = "U8"
) -> None:
    """Write a safetensors file of zeros: tensor → shape (None: any); weights with scales are `packed`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        kind = packed if f"{name}.absmax" in shapes else dtype
        size = BYTES[kind] * math.prod(shape or (1,))
        header[name] = {"dtype": kind, "shape": list(shape or (1,)), "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(at))
