"""The tables of adapters in a site file: `AdapterSection`, `ServeSection`, `GuardSection`; `Section`, the base of all.

docs/reference/configuration.md comes from the docstrings of the keys.
"""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator

from umbel.adapter import AdapterName


class Section(BaseModel):
    """A table of the site file: frozen, without unknown keys, and without infinite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class GuardSection(Section):
    """A task that no new version may break."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Name of this task in verdicts."""
    data: Path
    """Examples of a task that no new version may break, as JSONL like `[training].data`. They never leave the site."""
    max_loss_ratio: float = Field(default=1.01, ge=1)
    """A shadow is rejected when its loss on this task is, with confidence, above this many times the loss of the
    version (or base) that answers users now."""


class AdapterSection(Section):
    """An adapter that is trained and served. There may be several, each with data, versions and verdicts of its own."""

    name: AdapterName
    """Name that users put into `model`; the live version answers them."""
    data: Path | None = None
    """Its examples, as JSONL like `[training].data`, which is the default. They never leave the site."""
    eval_data: Path | None = None
    """Its held-out examples. Default: `[training].eval_data` where it has no `data` of its own, else
    `[training].eval_fraction` of its `data`."""
    share: float = Field(default=1.0, ge=0.001, le=1000)
    """Its part of the training time while other adapters have rounds, too, in proportion to theirs: an adapter with
    share 2 gets twice the time of one with share 1. Alone it gets all."""
    rank: PositiveInt | None = None
    """Largest rank of its versions here. Default: `[engine].max_lora_rank`, which it must not exceed."""
    trusted_key: Path | None = None
    """Public key of the centre of its federation (Ed25519, PEM). Default: `[site].trusted_key`."""
    api_keys: Path | None = None
    """File of keys, one per line, mode 0600. With it only requests with one of these keys see and reach this adapter:
    for all others it does not exist. Then every request needs a key; see `[engine].api_keys`."""
    priority: Literal["interactive", "batch"] = "interactive"
    """Class of its requests that name none: those of `batch` may take `[slo].batch_factor` times as long."""
    guard: tuple[GuardSection, ...] = ()
    """Tasks on which no new version of it may be worse, besides those of `[[shadow.guard]]`."""

    @field_validator("guard")
    @classmethod
    def _distinct_guards(cls, guards: tuple[GuardSection, ...]) -> tuple[GuardSection, ...]:
        return require_distinct(guards)


class ServeSection(Section):
    """An adapter that is only served: a PEFT directory, never trained and never changed."""

    name: AdapterName
    """Name that users put into `model`."""
    path: Path
    """PEFT directory: adapter_config.json and adapter_model.safetensors, for this base."""
    api_keys: Path | None = None
    """File of keys, one per line, mode 0600. With it only requests with one of these keys see and reach this adapter:
    for all others it does not exist. Then every request needs a key; see `[engine].api_keys`."""


def require_distinct(guards: tuple[GuardSection, ...]) -> tuple[GuardSection, ...]:
    """Return the guards; raise ValueError where two have the same name."""
    if len({guard.name for guard in guards}) < len(guards):
        raise ValueError("two guards have the same name; a verdict could not tell them apart")
    return guards
