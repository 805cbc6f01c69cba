"""`packing_of`, `packed_shapes`: what a base that bitsandbytes packed in 4 bits says of itself, and has in its files.

A weight [N, K] of a linear layer is N · K / 2 bytes there, two values in each, and for every 64 values there is a
scale. Embeddings, head and norms stay as they are.
"""

import importlib.util
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

RELEASE = "0.50.2"
"""The release of bitsandbytes whose numbers and layout were tested; `umbel[quant]` installs it."""
BLOCK = 64
"""Values that share a scale."""
NESTED_BLOCK = 256
"""Scales that share a scale of their own, where they are packed, too."""
METHOD = "bitsandbytes"
"""`quant_method` of the only quantised bases that umbel serves."""
REMEDY = "give the unquantised base, or pack that one in 4 bits with `umbel base pack`"
MISSING = f"the base is packed, and bitsandbytes is not installed here; pip install bitsandbytes=={RELEASE}"
MISSING_TO_PACK = f"packing needs bitsandbytes, which is not installed here; pip install bitsandbytes=={RELEASE}"

Packing = Literal["", "nf4", "fp4"]
"""Kind of number that the linear layers are packed in; empty for a base that is not packed."""


def packing_of(config: Mapping[str, Any]) -> Packing:
    """Return what the linear layers of a base are packed in, from the content of its config.json."""
    recipe = config.get("quantization_config")
    if not isinstance(recipe, dict) or recipe.get("quant_method") != METHOD or not recipe.get("load_in_4bit"):
        return ""
    return "nf4" if recipe.get("bnb_4bit_quant_type", "fp4") == "nf4" else "fp4"


def double_quant(config: Mapping[str, Any]) -> bool:
    """Return whether the scales of a packed base are packed as well."""
    return bool(config["quantization_config"].get("bnb_4bit_use_double_quant"))


def recipe_mistakes(recipe: object) -> Iterator[str]:
    """Yield what of a quantization_config cannot be served, each with its remedy."""
    method = recipe.get("quant_method") or recipe.get("quant_algo") if isinstance(recipe, dict) else None
    if not isinstance(recipe, dict) or method != METHOD:
        named = f" ({method})" if method else ""
        yield f"quantization_config{named}: of quantised bases only bitsandbytes' in 4 bits are served; {REMEDY}"
        return
    if recipe.get("load_in_8bit") or not recipe.get("load_in_4bit"):
        yield f"quantization_config: bitsandbytes in 8 bits is not served; {REMEDY}"
        return
    wanted: dict[str, tuple[object, ...]] = {
        "bnb_4bit_quant_type": ("nf4", "fp4"),
        "bnb_4bit_quant_storage": ("uint8", None),
        "llm_int8_skip_modules": (["lm_head"], None, []),
    }
    for key, served in wanted.items():
        if (found := recipe.get(key, "fp4" if key == "bnb_4bit_quant_type" else None)) not in served:
            yield f"quantization_config.{key} is {found!r}; {served[0]!r} or none is served; {REMEDY}"


def is_served(config: Mapping[str, Any]) -> bool:
    """Return whether the tensors in a base's files are known from its config.json: not quantised, or in 4 bits."""
    recipe = config.get("quantization_config")
    return recipe is None or not any(recipe_mistakes(recipe))


def packed_shapes(weight: str, shape: tuple[int, int], config: Mapping[str, Any]) -> dict[str, tuple[int, ...] | None]:
    """Return tensor → shape of what the files of a packed base have for one weight; None: of any shape."""
    values = math.prod(shape)
    blocks = -(-values // BLOCK)
    shapes: dict[str, tuple[int, ...] | None] = {
        weight: (-(-values // 2), 1),
        f"{weight}.absmax": (blocks,),
        f"{weight}.quant_map": (16,),
        f"{weight}.quant_state.bitsandbytes__{packing_of(config)}": None,
    }
    if double_quant(config):
        shapes[f"{weight}.nested_absmax"] = (-(-blocks // NESTED_BLOCK),)
        shapes[f"{weight}.nested_quant_map"] = (256,)
    return shapes


def packed_bytes(shape: tuple[int, int], config: Mapping[str, Any]) -> int:
    """Return the bytes that a packed weight and its scales take: 4.127 bits a value with double quantisation."""
    values = math.prod(shape)
    blocks = -(-values // BLOCK)
    scales = blocks + 4 * -(-blocks // NESTED_BLOCK) if double_quant(config) else 4 * blocks
    return -(-values // 2) + scales


def bitsandbytes_is_missing(config: Mapping[str, Any]) -> bool:
    """Return whether this base needs bitsandbytes and this environment has it not."""
    return bool(packing_of(config)) and importlib.util.find_spec(METHOD) is None
