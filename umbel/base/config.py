"""`config_mistakes`: what a base's config.json asks for that SGLang and the trainer cannot do, or would do differently.

SGLang computes with its own models, training with those of `transformers` on the same weights. For the families of
`umbel.base.shapes` both agree, except in what is named here (SGLang 0.5.23, transformers 5).
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from umbel.base.packed import REMEDY, recipe_mistakes
from umbel.errors import ConfigError, UmbelError, UnsupportedModel

ARCHITECTURES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}  # fmt: skip
"""`model_type` → the class by which SGLang finds its model."""
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
"""Keys without which no model can be built."""
QUANTIZED_FILES = ("hf_quant_config.json", "quant_model_description.json")
"""Files beside config.json from which SGLang concludes that the weights are quantised."""
SAME_ROPE = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary positions that SGLang and `transformers` compute alike."""
MISTRAL_WINDOW = 4096
"""Sliding window of a Mistral model whose config.json does not say one, as in `transformers`."""


def config_mistakes(model: Path, config: dict[str, Any], longest: int | None = None) -> Iterator[UmbelError]:
    """Yield what is wrong with a known family's config.json.

    `longest` is the number of tokens that a text of this site can have at most; None: as many as the base takes.
    """
    file = model / "config.json"
    lacking = [key for key in SIZES if not isinstance(config.get(key), int) or config[key] < 1]
    if lacking:
        yield ConfigError(f"{file}: lacks {', '.join(lacking)}; copy the model directory again")
    wanted, found = ARCHITECTURES[config["model_type"]], config.get("architectures")
    if not isinstance(found, list) or found[:1] != [wanted]:
        yield UnsupportedModel(
            f"{file}: architectures is {found!r}, not ['{wanted}'], so SGLang would not serve it as a language model; "
            f"give a base that is one"
        )
    if config.get("hidden_act", "silu") != "silu":
        yield UnsupportedModel(
            f"{file}: hidden_act {config['hidden_act']!r}: SGLang serves silu only; give such a base"
        )
    yield from _quantization(model, config)
    yield from _attention(file, config, longest)
    yield from _positions(file, config)


def _quantization(model: Path, config: dict[str, Any]) -> Iterator[UmbelError]:
    """Yield what about a quantised base cannot be served; one that bitsandbytes packed in 4 bits can be."""
    if (recipe := config.get("quantization_config")) is not None:
        yield from (UnsupportedModel(f"{model / 'config.json'}: {mistake}") for mistake in recipe_mistakes(recipe))
    if (asked := config.get("compression_config")) is not None:
        method = asked.get("quant_method") if isinstance(asked, dict) else None
        yield UnsupportedModel(
            f"{model / 'config.json'}: compression_config{f' ({method})' if method else ''}: of quantised bases only "
            f"bitsandbytes' in 4 bits are served; {REMEDY}"
        )
    for name in QUANTIZED_FILES:
        if (model / name).exists():
            yield UnsupportedModel(
                f"{model / name}: SGLang would take the base for one that is quantised in another way than "
                f"bitsandbytes' 4 bits, the only one that is served; remove the file, or {REMEDY}"
            )


def _attention(file: Path, config: dict[str, Any], longest: int | None) -> Iterator[UmbelError]:
    if config.get("dual_chunk_attention_config"):
        yield UnsupportedModel(
            f"{file}: dual_chunk_attention_config: training would attend otherwise than SGLang; remove the key, which "
            "only matters for texts longer than its chunk_size"
        )
    window = _window(config)
    longest = longest or config.get("max_position_embeddings") or 0
    if window is not None and longest > window:
        yield UnsupportedModel(
            f"{file}: attention is meant to reach {window} tokens back, but texts may have {longest}, and neither "
            f"SGLang nor training keeps to that window; set context_length = {window} in [engine.extra_args], and "
            f"[training].seq_len to no more, or give a base without a sliding window"
        )


def _window(config: dict[str, Any]) -> int | None:
    """Return the sliding window (tokens) that some layer of the model was made with, if there is one."""
    if config["model_type"] == "mistral":
        window = config.get("sliding_window", MISTRAL_WINDOW)
        return window if isinstance(window, int) else None
    if config["model_type"] == "llama" or not config.get("use_sliding_window"):
        return None
    layers = config.get("layer_types")
    slides = (
        "sliding_attention" in layers
        if isinstance(layers, list)
        else config.get("max_window_layers", 28) < (config.get("num_hidden_layers") or 0)
    )
    window = config.get("sliding_window", 4096)
    return window if slides and isinstance(window, int) else None


def _positions(file: Path, config: dict[str, Any]) -> Iterator[UmbelError]:
    """Yield what about the rotary positions SGLang and `transformers` compute differently, or not at all."""
    key = "rope_parameters" if isinstance(config.get("rope_parameters"), dict) else "rope_scaling"
    rope = config.get(key) or {}
    if not isinstance(rope, dict):
        yield ConfigError(f"{file}: {key} is not a JSON object; copy the model directory again")
        return
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in SAME_ROPE:
        yield UnsupportedModel(
            f"{file}: {key} of type {kind!r}: training would compute other positions than SGLang; give a base with "
            f"one of {', '.join(SAME_ROPE)}"
        )
    if kind == "yarn":
        yield from _yarn(file, key, rope)
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1):
        yield UnsupportedModel(
            f"{file}: partial_rotary_factor {partial!r}: training would compute other positions than SGLang; give a "
            "base without it"
        )


def _yarn(file: Path, key: str, rope: dict[str, Any]) -> Iterator[UmbelError]:
    """SGLang multiplies by `attn_factor` and does not know `attention_factor`; `transformers` does the opposite."""
    factor = rope.get("factor")
    usual = 0.1 * math.log(factor) + 1 if isinstance(factor, int | float) and factor > 1 else 1.0
    for name, same in (("attention_factor", usual), ("attn_factor", 1.0)):
        given = rope.get(name)
        if given is not None and not (isinstance(given, int | float) and math.isclose(given, same, rel_tol=1e-4)):
            yield UnsupportedModel(
                f"{file}: {key}.{name} = {given!r}: training would compute other positions than SGLang; give a base "
                "without it"
            )
