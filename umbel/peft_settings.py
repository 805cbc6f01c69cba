"""`PeftSettings`: the `adapter_config.json` of any PEFT LoRA adapter, or the reason why it is not plain LoRA.

Plain LoRA adds `scaling · B A` to the weights of linear layers and changes nothing else. A setting that umbel does not
know and that is switched on may change something else, so it is refused by its name.
"""

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from umbel.errors import AdapterError

HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "inference_mode",
    "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config",
}  # fmt: skip
"""Keys that say how an adapter was made, or that mean something only beside a key of REMEDIES."""
READ = {
    "alpha_pattern", "exclude_modules", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha",
    "peft_type", "r", "rank_pattern", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
"""Keys that `PeftSettings` reads."""
REMEDIES = {
    "alora_invocation_tokens": "an activated LoRA is on for a part of each prompt only; train it as plain LoRA",
    "arrow_config": "it chooses among other adapters for each token; serve those by themselves",
    "bias": "train it with bias = 'none'; SGLang loads no biases",
    "fan_in_fan_out": "it is for layers that are stored transposed, which no base of umbel has",
    "layer_replication": "it is for a base with layers in several places; merge it into such a base",
    "lora_bias": "train it with lora_bias = false; SGLang loads no biases",
    "modules_to_save": "train it without whole modules; SGLang loads the factors of linear layers only",
    "target_parameters": "it is for the experts of a mixture; name linear layers in target_modules",
    "trainable_token_indices": "train it without embeddings of tokens; SGLang loads linear layers only",
    "use_dora": "SGLang serves no DoRA; train it as plain LoRA, or merge it into a base of its own",
    "use_qalora": "it pools the inputs of each layer; train it as plain LoRA",
}
"""Known keys that change the computation when they are on → what to do."""
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base as it is; the others train against a changed one."""
LONGEST_PATTERN = 1000
"""Characters that a pattern of module names may have."""
T = TypeVar("T")
_OFF: tuple[object, ...] = (None, False, "none", "", [], {})


@dataclass(frozen=True)
class PeftSettings:
    """The settings that say which layers an adapter changes, and how strongly.

    >>> settings = PeftSettings.parse(b'{"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}')
    >>> settings.scaling("model.layers.0.self_attn.q_proj"), settings.adapts("model.layers.0.mlp.up_proj")
    (2.0, False)
    """

    rank: int
    alpha: float
    rslora: bool
    ranks: Mapping[str, int]
    """`rank_pattern`: a regular expression for the end of a module's path → its rank."""
    alphas: Mapping[str, float]
    """`alpha_pattern`: the same → its alpha."""
    targets: str | Sequence[str]
    excluded: str | Sequence[str] = ()
    layers: Sequence[int] | None = None
    layers_pattern: Sequence[str] = ()

    @classmethod
    def parse(cls, content: bytes) -> Self:
        """Read an `adapter_config.json`. Raises AdapterError for anything but the settings of plain LoRA."""
        try:
            found = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise AdapterError(f"not JSON ({error}); copy it again") from error
        if not isinstance(found, dict):
            raise AdapterError("not a JSON object; copy it again")
        _require_plain(found)
        layers = found.get("layers_to_transform")
        layers = [layers] if isinstance(layers, int) else layers
        if layers is not None and not _is_list_of(layers, int):
            raise AdapterError(f"layers_to_transform is {_shown(layers)}; it is a list of numbers")
        patterns = found.get("layers_pattern") or []
        parsed = cls(
            rank=_rank("r", found.get("r")),
            alpha=_number("lora_alpha", found.get("lora_alpha", 8)),
            rslora=_flag("use_rslora", found.get("use_rslora")),
            ranks={key: _rank(f"rank_pattern of {key!r}", value) for key, value in _dict(found, "rank_pattern")},
            alphas={key: _number(f"alpha_pattern of {key!r}", one) for key, one in _dict(found, "alpha_pattern")},
            targets=_names("target_modules", found.get("target_modules")),
            excluded=_names("exclude_modules", found.get("exclude_modules") or []),
            layers=layers or None,
            layers_pattern=_names("layers_pattern", [patterns] if isinstance(patterns, str) else patterns),
        )
        names = [one for one in (parsed.targets, parsed.excluded) if isinstance(one, str)]
        for pattern in (*parsed.ranks, *parsed.alphas, *parsed.layers_pattern, *names):
            _match(f"({pattern})", "")  # whether or not a module will need it
        return parsed

    def rank_of(self, module: str) -> int:
        """Return the rank of a module's factors."""
        return _by_pattern(self.ranks, module, self.rank)

    def scaling(self, module: str) -> float:
        """Return the number by which B A of a module is multiplied: alpha / r, with rsLoRA alpha / √r."""
        rank = self.rank_of(module)
        return _by_pattern(self.alphas, module, self.alpha) / (math.sqrt(rank) if self.rslora else rank)

    def adapts(self, module: str) -> bool:
        """Return whether peft puts factors on a linear layer of a transformer block."""
        if _is_named(self.excluded, module):
            return False
        if self.targets == "all-linear":
            return True
        if not _is_named(self.targets, module):
            return False
        if isinstance(self.targets, str) or self.layers is None:
            return True
        begin = [rf"(?:^|.*?\.){pattern}" for pattern in self.layers_pattern] or [r".*?\.[^.]*"]
        found = next((match for one in begin if (match := _match(rf"{one}\.(?P<idx>\d+)\.", module))), None)
        return found is not None and int(found["idx"]) in self.layers


def _require_plain(found: Mapping[str, Any]) -> None:
    """Raise AdapterError for a setting with which an adapter is more than factors of linear layers."""
    kind, task, start = (found.get(key) for key in ("peft_type", "task_type", "init_lora_weights"))
    if kind != "LORA":
        raise AdapterError(f"peft_type is {_shown(kind)}; only LORA can be served")
    if task not in (None, "CAUSAL_LM"):
        raise AdapterError(f"task_type is {_shown(task)}; only an adapter of a CAUSAL_LM can be served")
    if start not in PLAIN_STARTS:
        raise AdapterError(
            f"init_lora_weights is {_shown(start)}: it was trained against a base that this start changed; save it "
            "with peft's path_initial_model_for_weight_conversion, which makes plain LoRA of it"
        )
    for key in found.keys() - HARMLESS - READ:
        if found[key] not in _OFF:
            remedy = REMEDIES.get(key, "umbel does not know what it changes; train it as plain LoRA")
            raise AdapterError(f"{key} is {_shown(found[key])}: {remedy}")


def _is_named(names: str | Sequence[str], module: str) -> bool:
    """Return whether peft finds a module by a pattern for its whole path, or by the ends of paths in a list."""
    if isinstance(names, str):
        return bool(_match(rf"(?:{names})$", module))
    return any(module == name or module.endswith(f".{name}") for name in names)


def _by_pattern(found: Mapping[str, T], module: str, default: T) -> T:
    """Return the value of the first pattern that matches the end of a module's path, as peft does."""
    return next((value for pattern, value in found.items() if _match(rf"(.*\.)?({pattern})$", module)), default)


def _match(pattern: str, module: str) -> re.Match[str] | None:
    if len(pattern) > LONGEST_PATTERN:
        raise AdapterError(f"the pattern {pattern[:60]!r}… has over {LONGEST_PATTERN} characters; name the modules")
    try:
        return re.match(pattern, module)
    except (re.error, OverflowError, RecursionError) as error:
        raise AdapterError(f"{pattern!r} is not a regular expression ({error})") from error


def _dict(found: Mapping[str, Any], key: str) -> list[tuple[str, Any]]:
    value = found.get(key) or {}
    if not isinstance(value, dict):
        raise AdapterError(f"{key} is {_shown(value)}; it is an object of pattern and number")
    return list(value.items())


def _names(key: str, value: Any) -> str | Sequence[str]:
    if isinstance(value, str) or _is_list_of(value, str):
        return value  # type: ignore[no-any-return]
    raise AdapterError(f"{key} is {_shown(value)}; it is a list of names or a pattern")


def _is_list_of(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(type(one) is kind for one in value)


def _rank(key: str, value: object) -> int:
    if type(value) is not int or value < 1:
        raise AdapterError(f"{key} is {_shown(value)}; a rank is a whole number from 1 on")
    return value


def _flag(key: str, value: object) -> bool:
    if value is not None and not isinstance(value, bool):  # peft would take "false" for true
        raise AdapterError(f"{key} is {_shown(value)}; it is true or false")
    return value is True


def _number(key: str, value: object) -> float:
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:  # type: ignore[arg-type]
        raise AdapterError(f"{key} is {_shown(value)}; it is a finite number")
    return float(value)  # type: ignore[arg-type]


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
