"""`AdapterRef`, `AdapterManifest`, `Lifecycle`: an adapter version's name, its origin, and its states at a site.

`ServedRef`: the name of an adapter that is only served.
"""

import operator
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from umbel.base.fingerprint import BaseFingerprint
from umbel.base.origin import Kin
from umbel.errors import AdapterError

_NAME = r"[a-z][a-z0-9]*(?:[-_][a-z0-9]+)*"
MAX_VERSION = 10**9 - 1
_REF = re.compile(rf"({_NAME})@v(0|[1-9][0-9]{{0,8}})")
_SERVED_REF = re.compile(rf"({_NAME})@sha256:([0-9a-f]{{16}})")


def is_name(name: str) -> bool:
    """Return whether `name` may name an adapter."""
    return re.fullmatch(_NAME, name) is not None and len(name) <= 40


def check_name(name: str) -> str:
    """Return `name` if it may name an adapter; raise AdapterError otherwise."""
    if not is_name(name):
        raise AdapterError(
            f"{name!r} cannot name an adapter: use at most 40 lower-case letters, digits, single '-' and '_', "
            "starting with a letter"
        )
    return name


AdapterName = Annotated[str, AfterValidator(check_name)]
"""The type of an adapter's name in a pydantic model."""


@dataclass(frozen=True, order=True)
class AdapterRef:
    """The name of one immutable adapter version: `support@v12`, which the engine knows as `support-v12`.

    Raises AdapterError for a name or version that is not allowed.

    >>> ref = AdapterRef.parse("support@v12")
    >>> ref.name, ref.version, ref.engine_name, str(ref)
    ('support', 12, 'support-v12', 'support@v12')
    >>> ref < AdapterRef("support", 13)
    True
    """

    name: str
    version: int

    def __post_init__(self) -> None:
        check_name(self.name)
        if not 0 <= self.version <= MAX_VERSION:
            raise AdapterError(f"adapter {self.name!r}: version {self.version} is not within 0..{MAX_VERSION}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `support@v12`; raise AdapterError for anything else."""
        match = _REF.fullmatch(text)
        if match is None:
            raise AdapterError(f"{text!r} is not an adapter version; write it like 'support@v12'")
        return cls(match[1], int(match[2]))

    @property
    def engine_name(self) -> str:
        """The name under which SGLang loads this version, and no other one."""
        return f"{self.name}-v{self.version}"

    def __str__(self) -> str:
        return f"{self.name}@v{self.version}"


@dataclass(frozen=True)
class ServedRef:
    """The name of an adapter that is only served, with the beginning of its digest: `legal@sha256:0123456789abcdef`.

    Raises AdapterError for a name that is not allowed. No version's name is the same, for users or in the engine.

    >>> ref = ServedRef.parse("legal@sha256:0123456789abcdef")
    >>> ref.name, ref.digest, ref.engine_name, str(ref)
    ('legal', '0123456789abcdef', 'legal-sha256-0123456789abcdef', 'legal@sha256:0123456789abcdef')
    """

    name: str
    digest: str
    """First 16 hexadecimal digits of the sha256 of its weights as the engine loads them."""

    def __post_init__(self) -> None:
        check_name(self.name)

    @classmethod
    def of(cls, name: str, digest: str) -> Self:
        """Return the reference to weights of a whole `digest`."""
        return cls(name, digest[:16])

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `legal@sha256:0123456789abcdef`; raise AdapterError for anything else."""
        match = _SERVED_REF.fullmatch(text)
        if match is None:
            raise AdapterError(f"{text!r} is not an adapter and its digest, such as 'legal@sha256:0123456789abcdef'")
        return cls(match[1], match[2])

    @property
    def engine_name(self) -> str:
        """The name under which SGLang loads these weights, and no other ones."""
        return f"{self.name}-sha256-{self.digest}"

    @property
    def folder_name(self) -> str:
        """The name of the folder of these weights at a site, and of no other ones."""
        return f"{self.name}-{self.digest}"

    def __str__(self) -> str:
        return f"{self.name}@sha256:{self.digest}"


EngineRef = AdapterRef | ServedRef
"""Anything that the engine loads beside the base."""


class Lifecycle(StrEnum):
    """The state of one version at one site. TRANSITIONS says which states may follow."""

    CANDIDATE = "candidate"  # validated and on disk
    PROBING = "probing"  # loaded beside the incumbent and measured on the held-out examples
    WATCHING = "watching"  # measured on users' requests: it answers a share of them, or is sent copies
    JUDGED = "judged"  # the site's verdict is known; it stays loaded until it is promoted or discarded
    LIVE = "live"  # answers users
    RETIRED = "retired"  # was live once; loaded while it is `previous` or draining
    REJECTED = "rejected"  # discarded by the federation, superseded, or not loadable; never used again

    @property
    def is_shadow(self) -> bool:
        """True while the version is loaded beside the live one, to be judged or promoted."""
        return self in (Lifecycle.PROBING, Lifecycle.WATCHING, Lifecycle.JUDGED)

    def to(self, new: "Lifecycle") -> "Lifecycle":
        """Return `new` if a version may go there from here; raise AdapterError otherwise."""
        if new not in TRANSITIONS[self]:
            allowed = ", ".join(sorted(TRANSITIONS[self])) or "nothing"
            raise AdapterError(f"a {self} version cannot become {new}; it can become {allowed}")
        return new


TRANSITIONS: dict[Lifecycle, frozenset[Lifecycle]] = {
    Lifecycle.CANDIDATE: frozenset({Lifecycle.PROBING, Lifecycle.REJECTED}),
    Lifecycle.PROBING: frozenset({Lifecycle.WATCHING, Lifecycle.JUDGED, Lifecycle.REJECTED}),
    Lifecycle.WATCHING: frozenset({Lifecycle.PROBING, Lifecycle.JUDGED, Lifecycle.REJECTED}),  # probed anew
    Lifecycle.JUDGED: frozenset({Lifecycle.LIVE, Lifecycle.REJECTED}),
    Lifecycle.LIVE: frozenset({Lifecycle.RETIRED}),
    Lifecycle.RETIRED: frozenset({Lifecycle.LIVE}),  # roll back
    Lifecycle.REJECTED: frozenset(),
}


class Personal(BaseModel):
    """The part of an adapter that stays at each site and is joined there to the shared part."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    part: Literal["B", "adapter"]
    """Factor B (FedSA-LoRA), or an adapter of its own beside the shared one (dual adapters)."""
    rank: int = Field(default=0, ge=0)
    """Rank that it adds to the shared one: the rank of the site's own adapter, 0 for B."""

    @model_validator(mode="after")
    def _an_adapter_has_a_rank(self) -> Self:
        if (self.part == "adapter") != (self.rank > 0):
            raise ValueError(f"part = {self.part!r} with rank = {self.rank}: an adapter has a rank, B adds none")
        return self


class AdapterManifest(BaseModel):
    """The facts of one adapter version, which never change; stored beside its weights as `manifest.json`."""

    # JSON has no NaN: it is written as a string, which can be read back; `null` would make the manifest unreadable.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    name: str
    version: int = Field(ge=0, le=MAX_VERSION)
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    """sha256 of `adapter_model.safetensors`."""
    base: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Digest of the base fingerprint the adapter was trained against."""
    fingerprint: BaseFingerprint | None = None
    """The parts behind `base`, so that a site can name the part that differs."""
    kin: Kin = ""
    """Kin of the bases that may serve it, besides `base`; empty but in runs with `mixed-bases`."""
    lineage: str
    """Id of the registry that made it; every round key contains it."""
    round: int = Field(ge=0)
    parent: str | None = None
    """Digest of the version that training started from; None for the first version."""
    parents: tuple[str, ...] = ()
    """Digests of all versions that updates in this one were trained from: `parent`, and older ones of late updates."""
    truncation_of: str | None = None
    """Digest of the full version, where this is its truncation for a site of smaller rank; None otherwise."""
    rounding_of: str | None = None
    """Digest of the version as it was received, where this is the one that a site's engine loads, in its dtype."""
    personal: Personal | None = None
    """The part that each site joins to this one before serving it; None if there is none, or it is joined already."""
    rank: int = Field(ge=1)
    target_modules: tuple[str, ...]
    strategy: str = "init"
    options: dict[str, str | float | int | bool] = Field(default_factory=dict)
    """The strategy's options, after defaults were filled in."""
    weights: dict[str, float] = Field(default_factory=dict)
    """Site → its share of the aggregate; less, where its change was shortened. Changes are taken per step."""
    bases: dict[str, float] = Field(default_factory=dict, exclude_if=operator.not_)
    """Kind of base that trained it ("nf4", "fp4", or the dtype of one that is not packed) → the sum of its sites'
    `weights`; empty but in runs with `mixed-bases`."""
    left_out: dict[str, str] = Field(default_factory=dict)
    """Site → reason why its update is not in the aggregate."""
    skipped: dict[str, str] = Field(default_factory=dict, exclude_if=operator.not_)
    """Site → why nothing was worth training there; it took part, and counts for the quorum."""
    certificate: dict[str, float] = Field(default_factory=dict)
    """Module → ‖published − exact‖ / ‖exact‖ (Frobenius): what truncation to `rank` and rounding lost."""
    change_certificate: dict[str, float] = Field(default_factory=dict)
    """Module → the same error, relative to the exact change of this round; 0 where it changed nothing."""
    metrics: dict[str, float] = Field(default_factory=dict)
    site_metrics: dict[str, dict[str, float]] = Field(default_factory=dict)
    """Site → `train-loss` (nats per token), `seconds`, `staleness` (rounds), `rank`."""
    counts: dict[str, dict[str, int]] = Field(default_factory=dict)
    """Site → `num-examples`, `num-loss-tokens`, `steps` of its training, `held-examples`, `held-loss-tokens`."""
    run_id: str = ""
    code: str = ""
    """Version of umbel that made it."""
    config: str = ""
    """sha256 of the run configuration."""
    created: str = ""
    """ISO 8601, UTC."""

    @property
    def joined_rank(self) -> int:
        """Rank of the adapter that a site serves: the shared rank and the personal one."""
        return self.rank + (self.personal.rank if self.personal else 0)

    @property
    def ref(self) -> AdapterRef:
        """The version's name."""
        return AdapterRef(self.name, self.version)

    @property
    def ancestors(self) -> tuple[str, ...]:
        """Digests of the versions it came from, `parent` first; a manifest without `parents` has at most that one."""
        first = () if self.parent is None else (self.parent,)
        return tuple(dict.fromkeys(first + self.parents))
