"""What the running engine has of a site's versions: which are loaded, and what every name means to it."""

import asyncio
import logging
import shutil
from collections.abc import Container
from pathlib import Path

import httpx

from client.journal import Journal
from client.versions.version_files import directory, verify
from serving.aliases import AliasTable
from serving.engine import Engine
from serving.run_dir import ALIASES
from serving.supervisor import Supervisor
from umbel.adapter import AdapterRef, Lifecycle
from umbel.config import SiteConfig
from umbel.errors import EngineError
from umbel.faults import Move, Point, reach
from umbel.messages import ShadowState

DRAIN_POLL_S = 0.2

logger = logging.getLogger(__name__)


class Loading:
    """Brings the engine to what the journal says, and never the other way round."""

    def __init__(self, config: SiteConfig, journal: Journal, supervisor: Supervisor) -> None:
        self._config = config
        self._journal = journal
        self._supervisor = supervisor

    def table(self) -> AliasTable:
        """The alias table that the journal stands for."""
        return alias_table(self._config, self._journal, self._supervisor.loaded)

    def serving(self) -> dict[AdapterRef, Path]:
        """The versions an engine must have from its start, their files checked against the journal."""
        refs = [AdapterRef.parse(text) for text in self.table().addressable]
        return {ref: verify(self._config, self._journal.get(ref)) for ref in refs}

    async def ensure_loaded(self, engine: Engine, ref: AdapterRef) -> None:
        """Load and warm a version that the engine lacks. Raises AdapterError, EngineError, HTTPError."""
        if ref not in self._supervisor.loaded:
            folder = verify(self._config, self._journal.get(ref))  # what SGLang is about to read was validated
            reach(Point.LOAD_BEGUN)
            await engine.client.load(ref, folder)
            await engine.client.warm(ref)
            self._supervisor.loaded.add(ref)
            reach(Point.LOAD_DONE)

    async def prefill(self, engine: Engine, ref: AdapterRef) -> None:
        """Have the most used prompts computed; users wait a moment longer where that does not work, and that is all."""
        if not self._config.shadow.warm_prefixes:
            return
        try:
            done = await engine.client.prefill(ref, self._config.shadow.warm_prefixes)
            logger.info("adapter.prefilled ref=%s prefixes=%d", ref, done)
        except (EngineError, httpx.HTTPError) as error:
            logger.warning("adapter.prefill ref=%s failed: %s", ref, type(error).__name__)

    async def publish_table(self, move: Move) -> None:
        """Have names mean what the journal says: in the file that an engine reads at its start, then in the router."""
        self.table().write(self._config.site.state_dir / ALIASES)
        reach(move.written)
        engine = self._supervisor.engine
        if engine is not None:  # else the next one reads the file at its start
            try:
                await engine.client.reload_aliases()
            except httpx.HTTPError:
                logger.warning("the engine went away during an alias change; the next one starts with the new table")
        reach(move.told)

    async def retire(self, ref: AdapterRef) -> None:
        """Unload a version that nobody can ask for any more, once its last request has ended; then remove its files."""
        engine = self._supervisor.engine
        reach(Point.RETIRE_BEGUN)
        try:
            while engine is not None and (await engine.client.in_flight()).get(str(ref)):
                await asyncio.sleep(DRAIN_POLL_S)
            if engine is not None and ref in self._supervisor.loaded:
                await engine.client.unload(ref)
        except httpx.HTTPError:
            pass  # the engine is gone, and with it what it had loaded
        self._supervisor.loaded.discard(ref)
        reach(Point.RETIRE_UNLOADED)
        # SGLang would load a forgotten adapter again from its old path: there is none.
        shutil.rmtree(directory(self._config, ref), ignore_errors=True)
        reach(Point.RETIRE_REMOVED)
        logger.info("adapter.unloaded ref=%s", ref)


def alias_table(config: SiteConfig, journal: Journal, loaded: Container[AdapterRef]) -> AliasTable:
    """What every name means now. `loaded` are the versions in the running engine, which a journal cannot know.

    Users meet a shadow only while it is watched, and only where it is loaded: an engine that starts has no shadow.
    """
    adapters: dict[str, dict[str, str | None]] = {}
    watched: list[str] = []
    for section in config.adapter:
        shadows = [version for version in journal.versions(Lifecycle.SHADOW) if version.ref.name == section.name]
        aliases = {alias: journal.alias(section.name, alias) for alias in ("live", "previous")}
        aliases["shadow"] = shadows[-1].ref if shadows else None
        adapters[section.name] = {alias: str(ref) if ref else None for alias, ref in aliases.items()}
        if shadows and shadows[-1].report.state is ShadowState.WATCHING and shadows[-1].ref in loaded:
            watched.append(section.name)
    served = [adapters[name][alias] for name in adapters for alias in ("live", "previous")]
    policy = config.shadow
    return AliasTable.model_validate(
        {
            "base": config.model.served_name,
            "adapters": adapters,
            "addressable": [ref for ref in served if ref],
            "canary": {name: policy.canary_share for name in watched if policy.canary_share},
            "mirror": {name: policy.mirror_share for name in watched if policy.mirror_share},
        }
    )
