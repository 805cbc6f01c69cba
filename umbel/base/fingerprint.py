"""`BaseFingerprint`: hashes of the frozen base's model directory."""

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from umbel.base.files import weight_files
from umbel.base.packed import METHOD
from umbel.base.shapes import read_config
from umbel.errors import BaseMismatch, ConfigError

# Keys of config.json that have no effect on the model's output.
_IRRELEVANT = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"})
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "vocab.json", "merges.txt", "added_tokens.json",
)  # fmt: skip
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
# Keys of a bitsandbytes recipe that decide what the packed bytes mean. The others say in what to compute, or nothing.
_RECIPE = (
    "quant_method", "load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_quant_storage",
    "llm_int8_skip_modules",
)  # fmt: skip

# Values that mean the same as a missing key.
_DEFAULTS: tuple[object, ...] = (None, False, [], ["lm_head"], "uint8", "fp4")


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
            quantization=_digest(_recipe(quantization)),
            tokenizer=_digest([_digest_file(model / name) for name in _TOKENIZER_FILES if (model / name).is_file()]),
            chat_template=_digest([_digest_file(model / name) for name in _TEMPLATE_FILES if (model / name).is_file()]),
        )

    @property
    def digest(self) -> str:
        """sha256 over all parts: the identity of a base."""
        return _digest(self.model_dump())

    @property
    def dense(self) -> bool:
        """True for a base that is not quantised."""
        return self.quantization == _digest(None)

    @property
    def kin(self) -> str:
        """sha256 over all parts but `quantization`: what this base and those packed from it have in common."""
        return _digest(self.model_dump(exclude={"quantization"}))

    def require_same(
        self, other: "BaseFingerprint", *, here: str, there: str, remedy: str = "copy the same model directory to both"
    ) -> None:
        """Raise BaseMismatch with the parts that differ, unless `other` is the same base; `here`, `there` name both."""
        differing = [part for part, value in self.model_dump().items() if getattr(other, part) != value]
        if differing:
            raise BaseMismatch(f"{there} holds another base than {here}: {', '.join(differing)} differ; {remedy}")


def _recipe(quantization: object) -> object:
    """Return what of a quantization_config decides the weights."""
    if isinstance(quantization, dict) and quantization.get("quant_method") == METHOD:
        return {key: value for key, value in quantization.items() if key in _RECIPE and value not in _DEFAULTS}
    return quantization


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
