"""`ServeOnly`: load and unload adapters that are only served, while users are answered.

An adapter is loaded and warmed beside all others before its name means it: one entry in the journal, then
`aliases.json`, then the router. The one that had the name before answers its last requests and is unloaded then.
"""

import asyncio
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from client.imported.journal import Imported
from client.versions.background import Background
from client.versions.loading import Loading
from client.versions.served import Served
from serving.supervisor import Supervisor
from umbel import faults
from umbel.adapter import ServedRef, check_name
from umbel.errors import AdapterError, ConfigError, Conflict, EngineError, NotFound
from umbel.faults import Point, reach
from umbel.site.config import SiteConfig

logger = logging.getLogger(__name__)


class ServeOnly:
    """The operations of `umbel adapter load` and `unload`, and what [[serve]] asks for at a start."""

    def __init__(
        self, config: SiteConfig, supervisor: Supervisor, served: Served, loading: Loading, background: Background
    ) -> None:
        self._config = config
        self._supervisor = supervisor
        self._served = served
        self._store = served.imported
        self._journal = served.imported.journal
        self._loading = loading
        self._background = background
        self._changing = asyncio.Lock()

    async def apply_site_file(self) -> None:
        """Take what stands under [[serve]], before an engine is started; what has left the site file goes.

        Raises ConfigError, with one line per directory that cannot be served; then nothing has changed.
        """
        taken: list[Imported] = []
        wrong: list[str] = []
        for section in self._config.serve:
            try:
                taken.append(await asyncio.to_thread(self._store.take, section.name, section.path, listed=True))
            except AdapterError as error:
                wrong.append(f"[[serve]] {section.name}: {error}")
        if wrong:
            raise ConfigError("\n".join(wrong))
        for entry in taken:
            reach(Point.IMPORT_WRITTEN)
            old = self._journal.find(entry.name)
            self._journal.put(_since(entry, old))
            instead = f" instead_of={old.ref}" if old is not None and old.ref != entry.ref else ""
            logger.info("served.ready ref=%s path=%s%s", entry.ref, entry.path, instead)
        listed = {entry.name for entry in taken}
        for entry in self._journal.all():
            if entry.listed and entry.name not in listed:
                self._journal.remove(entry.name)
                logger.info("served.removed name=%s: it is not in the site file any more", entry.name)
            elif why := self._taken_by(entry.name):
                self._journal.remove(entry.name)
                self._served.recovered.append(f"{entry.ref} is not served any more: {why}")

    async def load(self, name: str, path: Path) -> dict[str, Any]:
        """Serve the PEFT directory at `path` under `name`, in place of what had the name; return the entry.

        The same adapter again is no change. Raises AdapterError for one that cannot be served, Conflict for a name that
        is taken, EngineError where the engine does not load it; then nothing has changed for users.
        """
        check_name(name)
        if not path.is_absolute():
            raise AdapterError(f"{path}: name the directory by its whole path")
        if why := self._taken_by(name):
            raise Conflict(f"{name!r} cannot be loaded: {why}; choose another name")
        async with self._changing:
            entry = await asyncio.to_thread(self._store.take, name, path, listed=False)
            reach(Point.IMPORT_WRITTEN)
            if _retirement(entry.ref) in self._background:
                raise EngineError(f"{entry.ref} is just being unloaded; ask again")
            old = self._journal.find(name)
            entry = _since(entry, old)
            try:
                await self._ensure_loaded(entry.ref)
            except (AdapterError, EngineError):
                if old is None or old.ref != entry.ref:
                    self._retire(entry.ref)
                raise
            reach(faults.SERVE.begun)
            self._journal.put(entry)
            reach(faults.SERVE.journalled)
            await self._loading.publish_table(faults.SERVE)
            logger.info("served.loaded ref=%s instead_of=%s path=%s", entry.ref, old.ref if old else None, path)
            if old is not None and old.ref != entry.ref:
                self._retire(old.ref)
            return {**entry.shown, "listed": name in self._listed()}

    async def unload(self, name: str) -> dict[str, Any]:
        """Serve an adapter no more, once its last request has ended. Raises NotFound where none has that name."""
        async with self._changing:
            entry = self._journal.find(name)
            if entry is None:
                here = ", ".join(one.name for one in self._journal.all()) or "none"
                taken = self._taken_by(name)
                why = f"; {taken}, and cannot be unloaded" if taken else ""
                raise NotFound(f"no adapter {name!r} is only served here; there is {here}{why}")
            reach(faults.UNSERVE.begun)
            self._journal.remove(name)
            reach(faults.UNSERVE.journalled)
            await self._loading.publish_table(faults.UNSERVE)
            logger.info("served.unloaded ref=%s", entry.ref)
            self._retire(entry.ref)
            return {**entry.shown, "listed": name in self._listed()}

    async def _ensure_loaded(self, ref: ServedRef) -> None:
        """Load an adapter into the engine, if there is one. One that ends the engine is in no later one."""
        engine = self._supervisor.engine
        if engine is None:
            return
        try:
            await self._loading.ensure_loaded(engine, ref)
        except httpx.HTTPError as error:
            raise EngineError(f"the engine went away while {ref} was loaded ({type(error).__name__})") from error

    def _taken_by(self, name: str) -> str:
        """Say what else has a name here; nothing where it is free."""
        if name == self._config.model.served_name:
            return "it is the name of the base"
        return "an adapter of that name is trained here, [[adapter]]" if name in self._config.adapters else ""

    def _listed(self) -> set[str]:
        return {section.name for section in self._config.serve}

    def _retire(self, ref: ServedRef) -> None:
        self._background.start(_retirement(ref), self._loading.retire(ref))


def _since(entry: Imported, known: Imported | None) -> Imported:
    """Return an entry with the time from which on these weights have had this name."""
    if known is None or known.digest != entry.digest:
        return entry
    return replace(entry, since=known.since)


def _retirement(ref: ServedRef) -> str:
    return f"retire {ref}"
