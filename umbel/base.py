"""`BaseFingerprint`: hashes of the frozen base's model directory; and the shapes of the layers that LoRA adapts."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from umbel.base_files import EMBEDDING, json_object, weight_files
from umbel.errors import BaseMismatch, ConfigError, UnsupportedModel

# Keys of config.json that have no effect on the model's output.
_IRRELEVANT = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"})
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "vocab.json", "merges.txt", "added_tokens.json",
)  # fmt: skip
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")


FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""`model_type` of the model families that umbel can view, train and serve."""
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Linear layers of a transformer block, in layer order."""


def linear_shapes(model: Path, target_modules: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """Return module path → (out, in) of every linear layer that `target_modules` names, in layer order.

    Raises ConfigError or UnsupportedModel as `read_config` does.
    """
    config = read_config(model)
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


def weight_shapes(model: Path) -> dict[str, tuple[int, ...]]:
    """Return tensor → shape of the weights that a base must have in its files.

    Raises ConfigError or UnsupportedModel as `read_config` does.
    """
    config = read_config(model)
    hidden = config["hidden_size"]
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{norm}.weight"] = (hidden,)
    biased = _biased(config)
    for module, shape in linear_shapes(model, LINEARS).items():
        shapes[f"{module}.weight"] = shape
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


class BaseFingerprint(BaseModel):
    """sha256 of each part of a base model directory; `digest` combines them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: str
    config: str
    quantization: str
    tokenizer: str
    chat_template: str

    @classmethod
    def of(cls, model: Path) -> "BaseFingerprint":
        """Read and hash a model directory, in about a second per gigabyte; raise ConfigError or UnsupportedModel.

        Of *.safetensors only those count that SGLang loads. Of generation_config.json only the tokens that end an
        answer count, where they are not in config.json: its defaults of sampling are each site's own.
        """
        config = read_config(model)
        shards = weight_files(model)
        quantization = config.pop("quantization_config", None)
        kept = {key: value for key, value in config.items() if key not in _IRRELEVANT}
        if ends := _more_ends(model, config):
            kept["generation_config.eos_token_id"] = ends
        return cls(
            weights=_digest([_digest_file(shard) for shard in shards]),
            config=_digest(kept),
            quantization=_digest(quantization),
            tokenizer=_digest([_digest_file(model / name) for name in _TOKENIZER_FILES if (model / name).is_file()]),
            chat_template=_digest([_digest_file(model / name) for name in _TEMPLATE_FILES if (model / name).is_file()]),
        )

    @property
    def digest(self) -> str:
        """sha256 over all parts: the identity of a base."""
        return _digest(self.model_dump())

    def require_same(self, other: "BaseFingerprint", *, here: str, there: str) -> None:
        """Raise BaseMismatch with the parts that differ, unless `other` is the same base; `here`, `there` name both."""
        differing = [part for part, value in self.model_dump().items() if getattr(other, part) != value]
        if differing:
            raise BaseMismatch(
                f"{there} holds another base than {here}: {', '.join(differing)} differ; "
                "copy the same model directory to both"
            )


def _more_ends(model: Path, config: dict[str, Any]) -> list[int]:
    """Return the tokens that end an answer by generation_config.json alone; SGLang takes those of both files."""
    file = model / "generation_config.json"
    if not file.is_file():
        return []
    try:
        also = json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"{file}: not JSON ({error}); copy the model directory again") from error
    if not isinstance(also, dict):
        raise ConfigError(f"{file}: not a JSON object; copy the model directory again")
    return sorted(_token_ids(also.get("eos_token_id")) - _token_ids(config.get("eos_token_id")))


def _token_ids(value: object) -> set[int]:
    return {token for token in (value if isinstance(value, list) else [value]) if isinstance(token, int)}


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _digest_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
