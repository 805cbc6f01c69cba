"""What the running engine has of a site's versions: which are loaded, and what every name means to it."""

import asyncio
import logging
import shutil
from pathlib import Path

import httpx

from client.journal import Journal
from client.recovery import directory, verify
from client.table import alias_table
from serving.aliases import AliasTable
from serving.engine import Engine
from serving.supervisor import Supervisor
from umbel.adapter import AdapterRef
from umbel.config import SiteConfig
from umbel.errors import EngineError
from umbel.faults import Move, Point, reach

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
        self.table().write(self._config.site.state_dir / "aliases.json")
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
