"""`Served`: says what an engine must serve by the journal, and forgets versions whose files are damaged."""

from collections.abc import Collection
from pathlib import Path

from client.imported.store import ImportedStore
from client.journal import Journal
from client.versions import recovery
from client.versions.version_files import directory, verify
from serving.aliases import AliasTable
from umbel import peft_dir
from umbel.adapter import AdapterRef, EngineRef, Lifecycle, ServedRef
from umbel.site.config import SiteConfig


class Served:
    """The alias table and the versions behind it, made from the journal; a Supervisor asks for them at each start."""

    def __init__(self, config: SiteConfig, journal: Journal, shapes: peft_dir.Shapes) -> None:
        self._config = config
        self._journal = journal
        self.imported = ImportedStore(config, journal.imported, shapes)
        self.recovered: list[str] = []
        """Damaged, half-made and left-over things found since this daemon began, in words."""
        self.damages = 0
        """Number of versions that were forgotten; a measurement of a version from before a change is void."""

    def what_to_serve(self, loaded: Collection[EngineRef]) -> tuple[AliasTable, dict[EngineRef, Path]]:
        """Return the alias table and what an engine must load, after damaged versions were forgotten."""
        self.forget_damaged()
        return self.table(loaded), self.versions()

    def table(self, loaded: Collection[EngineRef]) -> AliasTable:
        """Return the alias table that the journal stands for; `loaded` are the versions in the running engine."""
        return alias_table(self._config, self._journal, loaded)

    def versions(self) -> dict[EngineRef, Path]:
        """Return all that users can ask for, and the verified folders. Raises AdapterError for damage."""
        refs: list[EngineRef] = [AdapterRef.parse(text) for text in self.table(()).addressable]
        refs += [entry.ref for entry in self._journal.imported.all()]
        return {ref: self.verified(ref) for ref in refs}

    def verified(self, ref: EngineRef) -> Path:
        """Return the folder of a version, or of an adapter that is only served, after checking every byte in it.

        Raises AdapterError if it is not as it was written for the engine.
        """
        if isinstance(ref, ServedRef):
            return self.imported.verified(ref)
        return verify(self._config, self._journal.get(ref))

    def directory(self, ref: EngineRef) -> Path:
        """Return the folder of a version, or of an adapter that is only served."""
        return self.imported.directory(ref) if isinstance(ref, ServedRef) else directory(self._config, ref)

    def forget_damaged(self) -> None:
        """Forget versions whose files do not verify, so that no engine reads them; mend what is only served."""
        forgotten = recovery.forget_damaged(self._config, self._journal)
        self.damages += len(forgotten)
        self.recovered += [*forgotten, *self.imported.mend()]

    def sweep(self) -> None:
        """Remove files that no entry of the journal stands for. Only before an engine is started."""
        self.recovered += recovery.sweep(self._config, self._journal)


def alias_table(config: SiteConfig, journal: Journal, loaded: Collection[EngineRef]) -> AliasTable:
    """Return the meaning of every name now. `loaded` are the versions in the running engine; no journal knows them.

    Users meet a shadow only while it is watched, and only where it is loaded: an engine that starts has no shadow.
    Some stay with the version before in a roll-back window, until it ends or something else answers.
    """
    windows = {window.ref.name: window for window in journal.windows.open()}
    adapters: dict[str, dict[str, str | None]] = {}
    watched: list[str] = []
    compared: list[str] = []
    for section in config.adapter:
        versions = journal.versions(adapter=section.name)
        shadow = next((version for version in reversed(versions) if version.state.is_shadow), None)
        aliases = {alias: journal.alias(section.name, alias) for alias in ("live", "previous")}
        aliases["shadow"] = shadow.ref if shadow else None
        adapters[section.name] = {alias: str(ref) if ref else None for alias, ref in aliases.items()}
        if shadow and shadow.state is Lifecycle.WATCHING and shadow.ref in loaded:
            watched.append(section.name)
        window = windows.get(section.name)
        if window and (window.ref, window.instead_of) == (aliases["live"], aliases["previous"]):
            compared.append(section.name)
    served = [adapters[name][alias] for name in adapters for alias in ("live", "previous")]
    policy = config.shadow
    return AliasTable.model_validate(
        {
            "base": config.model.served_name,
            "adapters": adapters,
            "addressable": [ref for ref in served if ref],
            "served": {entry.name: str(entry.ref) for entry in journal.imported.all()},
            "canary": {name: policy.canary_share for name in watched if policy.canary_share},
            "control": {name: policy.control_share for name in compared if policy.rollback_window_s},
            "redraw_users": policy.redraw_users,
            "mirror": {name: policy.mirror_share for name in watched if policy.mirror_share},
        }
    )
