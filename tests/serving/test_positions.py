"""Rotary positions: SGLang's are those of `transformers`, with which training computes, or the base is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from sglang.srt.layers.rotary_embedding import get_rope
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tests.toys.sites.base_dir import CONFIG
from umbel.base.config import config_mistakes

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SAME: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": YARN,
    "yarn with betas": {**YARN, "beta_fast": 16, "beta_slow": 2},
    "yarn with mscale": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
}  # fmt: skip
OTHER: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn with attention_factor": {**YARN, "attention_factor": 1.3},
    "yarn with attn_factor": {**YARN, "attn_factor": 1.3},
}


def largest_difference(rope: dict[str, Any]) -> float:
    """The largest difference of a cosine or sine over 200 positions; 256 are what the model was made for."""
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, head_dim=16, max_position_embeddings=256,
        rope_parameters={"rope_theta": 10000.0, **rope},
    )  # fmt: skip
    trained = LlamaRotaryEmbedding(config=config)(torch.zeros(1, 200, 16), torch.arange(200)[None])
    served = get_rope(
        16, rotary_dim=16, max_position=256, base=10000.0, is_neox_style=True,
        rope_scaling=dict(config.rope_parameters),
    )  # fmt: skip
    cos, sin = served.cos_sin_cache[:200].float().chunk(2, dim=-1)
    return max(float((ours[0, :, :8] - theirs).abs().max()) for ours, theirs in zip(trained, (cos, sin), strict=True))


def refused(rope: dict[str, Any]) -> bool:
    return any(
        "compute other positions" in str(error) for error in config_mistakes(Path(), CONFIG | {"rope_scaling": rope})
    )


@pytest.mark.parametrize("name", SAME)
def test_positions_that_are_the_same_are_served(name: str) -> None:
    assert largest_difference(SAME[name]) < 1e-5
    assert not refused(SAME[name])


@pytest.mark.parametrize("name", OTHER)
def test_positions_that_differ_are_refused(name: str) -> None:
    assert largest_difference(OTHER[name]) > 0.1
    assert refused(OTHER[name])
