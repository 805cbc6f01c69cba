"""`AliasTable`: maps the names in users' requests to versions. The daemon writes it, the router reads it."""

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator

from umbel.adapter import AdapterRef, EngineRef, ServedRef
from umbel.errors import NotFound
from umbel.peft_dir import replace_durably

BASE_LABEL = "base"
"""The name of the base in the header `x-umbel-adapter`, in counts and in reports, where a version has `support@v12`."""

Alias = Literal["live", "shadow", "previous"]
Ref = Annotated[str, AfterValidator(lambda text: str(AdapterRef.parse(text)))]
"""A version as text, such as `support@v12`."""
Digest = Annotated[str, AfterValidator(lambda text: str(ServedRef.parse(text)))]
"""An adapter that is only served as text, such as `legal@sha256:0123456789abcdef`."""


class AliasTable(BaseModel):
    """Immutable snapshot of all aliases of a site; replaced as a whole, so that a promotion is one assignment.

    >>> table = AliasTable(
    ...     base="llama",
    ...     adapters={"support": {"live": "support@v2", "previous": "support@v1", "shadow": "support@v3"}},
    ...     addressable=("support@v2", "support@v1"),
    ...     served={"legal": "legal@sha256:0123456789abcdef"},
    ... )
    >>> str(table.resolve("support")), str(table.resolve("llama:support"))
    ('support@v2', 'support@v2')
    >>> str(table.resolve("legal"))
    'legal@sha256:0123456789abcdef'
    >>> str(table.resolve("support@previous"))
    'support@v1'
    >>> table.resolve("llama") is None  # the base
    True
    >>> table.names()
    ['llama', 'support', 'legal', 'support@v2', 'support@v1', 'support@live', 'support@previous']
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    base: str
    """The name by which users ask for the base."""
    adapters: dict[str, dict[Alias, Ref | None]]
    """Adapter → alias → version; `live: None` means that the base answers until a first version is promoted."""
    addressable: tuple[Ref, ...] = ()
    """Versions that users may ask for by number: live and previous ones, no shadow."""
    served: dict[str, Digest] = {}
    """Adapter that is only served → its digest: no version, no shadow, nothing to go back to."""
    canary: dict[str, float] = {}
    """Adapter → the share of its users (0..1) whom its shadow answers; only while the shadow is watched."""
    control: dict[str, float] = {}
    """Adapter → the share of its users (0..1) whom the version before still answers; only in a roll-back window."""
    redraw_users: bool = False
    """True if each version has other users in its canary and control."""
    mirror: dict[str, float] = {}
    """Adapter → the share of its live version's requests that the shadow is given once more, unseen by users."""

    @model_validator(mode="after")
    def _what_is_watched_is_there(self) -> Self:
        missing = [name for name in (*self.canary, *self.mirror) if not self.adapters.get(name, {}).get("shadow")]
        if missing:
            raise ValueError(f"{missing[0]} has a canary or a mirror, and no shadow")
        alone = [name for name in self.control if not self.adapters.get(name, {}).get("live")]
        if alone:
            raise ValueError(f"{alone[0]} has a control, and no live version")
        return self

    @model_validator(mode="after")
    def _what_is_served_has_its_own_name(self) -> Self:
        for name, text in self.served.items():
            if ServedRef.parse(text).name != name or name in (self.base, *self.adapters):
                raise ValueError(f"{name} is served as {text}, under the name of another adapter or of the base")
        return self

    @classmethod
    def read(cls, path: Path) -> "AliasTable":
        """Read a table; raise OSError or ValueError if the file is missing or damaged."""
        return cls.model_validate_json(path.read_text())

    def write(self, path: Path) -> None:
        """Replace the file by an atomic rename."""
        replace_durably(path, self.model_dump_json(indent=2).encode())

    def plain(self, model: str) -> str:
        """Return the name that `model` means: SGLang's users write `llama:support` for `support`."""
        adapter = model.removeprefix(f"{self.base}:")
        return model if adapter.partition(":")[0] == self.base else adapter

    def resolve(self, model: str) -> EngineRef | None:
        """Return the version or served adapter that `model` in a user's request stands for; None is the base.

        Raises NotFound, which lists the names that exist.
        """
        asked, model = model, self.plain(model)
        if model == self.base:
            return None
        if model in self.served:
            return ServedRef.parse(self.served[model])
        if model in self.adapters:
            live = self.adapters[model].get("live")
            return AdapterRef.parse(live) if live else None
        name, _, which = model.partition("@")
        version = model if model in self.addressable else self.adapters.get(name, {}).get(which)  # type: ignore[call-overload]
        if version not in self.addressable:
            raise NotFound(f"The model {asked[:200]!r} does not exist. Available: {', '.join(self.names())}.")
        return AdapterRef.parse(version)

    def without(self, adapters: Collection[str]) -> Self:
        """Return the table as it would be if these adapters were not there.

        >>> table.without({"support"}).names()
        ['llama', 'legal']
        """
        kept = {
            field: {name: value for name, value in by_name.items() if name not in adapters}
            for field, by_name in self
            if isinstance(by_name, dict)
        }
        versions = tuple(ref for ref in self.addressable if AdapterRef.parse(ref).name not in adapters)
        return self.model_copy(update={**kept, "addressable": versions})

    def adapter_of(self, model: str) -> str | None:
        """Return the adapter that `model` in a user's request belongs to; None is the base. Raises as `resolve` does.

        >>> table.adapter_of("support@v1")
        'support'
        """
        self.resolve(model)
        name = self.plain(model)
        return None if name == self.base else name.partition("@")[0]

    def shadow(self, adapter: str) -> AdapterRef | None:
        """Return the version that is loaded beside the live one, if there is one."""
        return self._version(adapter, "shadow")

    def previous(self, adapter: str) -> AdapterRef | None:
        """Return the version that answered before the live one; None if that was the base."""
        return self._version(adapter, "previous")

    def labels(self) -> set[str]:
        """Return every version that an alias points to, and every adapter that is only served."""
        versions = (version for aliases in self.adapters.values() for version in aliases.values() if version)
        return {*versions, *self.served.values()}

    def names(self) -> list[str]:
        """Return every `model` a user may ask for, the usual ones first."""
        aliased = [
            f"{name}@{alias}"
            for name, aliases in self.adapters.items()
            for alias, version in aliases.items()
            if version in self.addressable
        ]
        return [self.base, *self.adapters, *self.served, *self.addressable, *aliased]

    def _version(self, adapter: str, alias: Alias) -> AdapterRef | None:
        version = self.adapters.get(adapter, {}).get(alias)
        return AdapterRef.parse(version) if version else None
