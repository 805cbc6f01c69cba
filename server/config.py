"""`RunConfig`, `defaults`: `[tool.flwr.app.config]` and `flwr run --run-config`, parsed once and frozen."""

import difflib
import hashlib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
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
from strategies.options import StrategyConfig
from umbel.adapter import AdapterName
from umbel.errors import ConfigError
from umbel.messages import Objective, TrainPlan

ALONE = "alone"
"""`strategy` of the versions that a site makes alone (server/alone.py)."""
ENDLESS = 1_000_000_000
"""`rounds` of a site alone that goes on until it is stopped."""


class RunConfig(StrategyConfig):
    """The settings of one run. Keys are written with hyphens: `round-seconds` is `round_seconds` here.

    Every key has its default in pyproject.toml and is required here, so that no default is stated twice; those of
    `StrategyConfig`, which strategies need without a run configuration, too, are held to pyproject.toml by a test.

    >>> config = RunConfig.of({**defaults, "registry": "/srv/umbel/registry", "rounds": 10})
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", alias_generator=lambda name: name.replace("_", "-"), allow_inf_nan=False
    )

    registry: Path
    adapter: AdapterName
    strategy: str
    rounds: NonNegativeInt
    quorum: PositiveInt
    mixed_bases: bool
    round_seconds: PositiveFloat
    straggler_seconds: NonNegativeFloat
    grace_seconds: PositiveFloat
    waves: str
    wave_seconds: NonNegativeFloat
    wave_failures: float = Field(ge=0.0, le=1.0)
    rank: PositiveInt
    steps: PositiveInt
    objective: Objective
    dpo_beta: PositiveFloat
    batch_size: PositiveInt
    learning_rate: PositiveFloat
    schedule: Literal["constant", "cosine"]
    warmup_steps: NonNegativeInt
    weight_decay: NonNegativeFloat
    clip_norm: PositiveFloat
    seed: NonNegativeInt
    proximal: NonNegativeFloat
    signing_key: Path | None
    site_keys: Path | None

    @field_validator("signing_key", "site_keys", mode="before")
    @classmethod
    def _none_if_empty(cls, path: object) -> object:
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
        """The training that a site does in one round."""
        return TrainPlan(
            rank=self.rank, steps=self.steps, seconds=self.round_seconds, batch_size=self.batch_size,
            objective=self.objective, beta=self.dpo_beta,
            learning_rate=self.learning_rate, schedule=self.schedule, warmup_steps=self.warmup_steps,
            weight_decay=self.weight_decay, clip_norm=self.clip_norm, proximal=self.proximal, seed=self.seed,
        )  # fmt: skip

    @property
    def rollout(self) -> Waves:
        """The waves in which an accepted version goes to the sites."""
        return Waves(Waves.parse(self.waves), self.wave_seconds, self.wave_failures)

    @property
    def digest(self) -> str:
        """sha256 of these settings; runs with the same digest were asked to do the same."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    @property
    def options(self) -> dict[str, str | float | int | bool]:
        """Keywords for the strategy: `catalogue.find(config.strategy)(**config.options)`."""
        named = {key: getattr(self, key) for key in StrategyConfig.model_fields}
        return {"max_examples": self.steps * self.batch_size, "max_steps": self.steps, **named}


def defaults() -> dict[str, Any]:
    """Return the default of every key, as pyproject.toml says it; raise ConfigError where that file is not there."""
    project = Path(__file__).parents[1] / "pyproject.toml"
    try:
        found: dict[str, Any] = tomllib.loads(project.read_text())["tool"]["flwr"]["app"]["config"]
    except FileNotFoundError as error:
        raise ConfigError(
            f"{project} does not exist; install umbel from its checkout, with `pip install -e`"
        ) from error
    return found


def _explain(key: str, kind: str, message: str) -> str:
    if kind == "extra_forbidden":
        keys = [str(field.alias) for field in RunConfig.model_fields.values()]
        near = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
        return f"{key} is not a setting; " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(keys)}")
    said = message.removeprefix("Value error, ")
    return f"{key} is missing" if kind == "missing" else f"{key}: {said}" if key else said
