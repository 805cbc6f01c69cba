"""The run configuration: `[tool.flwr.app.config]` and `flwr run --run-config`, parsed once and frozen."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, ValidationError, field_validator

from umbel.adapter import AdapterName
from umbel.errors import ConfigError
from umbel.messages import TrainPlan


class RunConfig(BaseModel):
    """What a run does. Keys are written with hyphens, and every one has its default in pyproject.toml."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", alias_generator=lambda name: name.replace("_", "-"), allow_inf_nan=False
    )

    registry: Path
    adapter: AdapterName
    strategy: str
    rounds: PositiveInt
    quorum: PositiveInt
    round_seconds: PositiveFloat
    grace_seconds: PositiveFloat
    rank: PositiveInt
    steps: PositiveInt
    batch_size: PositiveInt
    learning_rate: PositiveFloat
    schedule: Literal["constant", "cosine"]
    warmup_steps: int
    weight_decay: float
    clip_norm: PositiveFloat
    seed: int

    @field_validator("registry")
    @classmethod
    def _absolute(cls, path: Path) -> Path:
        expanded = path.expanduser()
        if not expanded.is_absolute():
            raise ValueError(
                f"{path} is relative, and a ServerApp's working directory is Flower's; "
                "write an absolute path, or one that starts with ~"
            )
        return expanded

    @classmethod
    def of(cls, run_config: Mapping[str, object]) -> "RunConfig":
        """Parse Flower's flat run configuration; raise ConfigError with one line per mistake."""
        try:
            return cls.model_validate(dict(run_config))
        except ValidationError as error:
            lines = [_explain(str(mistake["loc"][0]), mistake["type"], mistake["msg"]) for mistake in error.errors()]
            raise ConfigError("\n".join(f"run configuration: {line}" for line in lines)) from error

    @property
    def plan(self) -> TrainPlan:
        """What a site trains in one round."""
        return TrainPlan(
            rank=self.rank, steps=self.steps, seconds=self.round_seconds, batch_size=self.batch_size,
            learning_rate=self.learning_rate, schedule=self.schedule, warmup_steps=self.warmup_steps,
            weight_decay=self.weight_decay, clip_norm=self.clip_norm, seed=self.seed,
        )  # fmt: skip


def _explain(key: str, kind: str, message: str) -> str:
    if kind == "extra_forbidden":
        keys = [str(field.alias) for field in RunConfig.model_fields.values()]
        near = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
        return f"{key} is not a setting; " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(keys)}")
    return f"{key} is missing" if kind == "missing" else f"{key}: {message.removeprefix('Value error, ')}"
