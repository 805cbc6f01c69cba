"""The run configuration: `[tool.flwr.app.config]` and `flwr run --run-config`, parsed once and frozen."""

import difflib
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from server.waves import Waves
from strategies.options import Options, Robust
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
    rounds: NonNegativeInt
    quorum: PositiveInt
    round_seconds: PositiveFloat
    grace_seconds: PositiveFloat
    rank: PositiveInt
    steps: PositiveInt
    batch_size: PositiveInt
    learning_rate: PositiveFloat
    schedule: Literal["constant", "cosine"]
    warmup_steps: NonNegativeInt
    weight_decay: NonNegativeFloat
    clip_norm: PositiveFloat
    seed: NonNegativeInt
    straggler_seconds: NonNegativeFloat = 30.0
    proximal: NonNegativeFloat = 0.0
    waves: str = "1"
    wave_seconds: NonNegativeFloat = 0.0
    wave_failures: float = Field(default=0.0, ge=0.0, le=1.0)
    # What composes with the strategy: see strategies/options.py.
    buffered: bool = False
    weight_cap: NonNegativeInt = 0
    norm_clip: PositiveFloat = 2.0
    robust: Robust = "none"
    byzantine: NonNegativeInt = 0
    trusted_site: str = ""
    server_momentum: NonNegativeFloat = 0.0
    stack_rank: NonNegativeInt = 0
    personal_rank: NonNegativeInt = 0
    device: str = "cpu"
    signing_key: Path | None = None
    site_keys: Path | None = None

    @field_validator("signing_key", "site_keys", mode="before")
    @classmethod
    def _unsigned(cls, path: object) -> object:
        return path or None  # Flower's configuration has no null

    @field_validator("registry", "signing_key", "site_keys")
    @classmethod
    def _absolute(cls, path: Path | None) -> Path | None:
        expanded = path.expanduser() if path else None
        if expanded is not None and not expanded.is_absolute():
            raise ValueError(
                f"{path} is relative, and a ServerApp's working directory is Flower's; "
                "write an absolute path, or one that starts with ~"
            )
        return expanded

    @field_validator("waves")
    @classmethod
    def _rising(cls, waves: str) -> str:
        Waves.parse(waves)
        return waves

    @model_validator(mode="after")
    def _enough_sites(self) -> Self:
        if self.robust == "multi_krum" and self.quorum < 2 * self.byzantine + 3:
            raise ValueError(
                f"multi_krum against byzantine = {self.byzantine} needs 2 · {self.byzantine} + 3 updates; "
                f"set quorum to {2 * self.byzantine + 3} or more"
            )
        if 0 < self.stack_rank < self.rank:
            raise ValueError(f"stack-rank = {self.stack_rank} is below rank = {self.rank}, which a single site fills")
        return self

    @classmethod
    def of(cls, run_config: Mapping[str, object]) -> "RunConfig":
        """Parse Flower's flat run configuration; raise ConfigError with one line per mistake."""
        try:
            return cls.model_validate(dict(run_config))
        except ValidationError as error:
            lines = [_explain(".".join(map(str, one["loc"])), one["type"], one["msg"]) for one in error.errors()]
            raise ConfigError("\n".join(f"run configuration: {line}" for line in lines)) from error

    @property
    def plan(self) -> TrainPlan:
        """What a site trains in one round."""
        return TrainPlan(
            rank=self.rank, steps=self.steps, seconds=self.round_seconds, batch_size=self.batch_size,
            learning_rate=self.learning_rate, schedule=self.schedule, warmup_steps=self.warmup_steps,
            weight_decay=self.weight_decay, clip_norm=self.clip_norm, proximal=self.proximal, seed=self.seed,
        )  # fmt: skip

    @property
    def rollout(self) -> Waves:
        """How an accepted version goes to the sites."""
        return Waves(Waves.parse(self.waves), self.wave_seconds, self.wave_failures)

    @property
    def digest(self) -> str:
        """sha256 of these settings: two runs with the same one were asked to do the same."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    @property
    def options(self) -> dict[str, str | float | int | bool]:
        """What the strategy is made with: `catalogue.find(config.strategy)(**config.options)`."""
        named = {key: getattr(self, key) for key in Options.model_fields if key in RunConfig.model_fields}
        return {"max_examples": self.steps * self.batch_size, **named}


def _explain(key: str, kind: str, message: str) -> str:
    if kind == "extra_forbidden":
        keys = [str(field.alias) for field in RunConfig.model_fields.values()]
        near = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
        return f"{key} is not a setting; " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(keys)}")
    said = message.removeprefix("Value error, ")
    return f"{key} is missing" if kind == "missing" else f"{key}: {said}" if key else said
