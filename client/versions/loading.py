"""`Loading`: load, warm and unload versions in the running engine, and give it the alias table."""

import asyncio
import logging
import shutil

import httpx

from client.journal import Journal
from client.versions.served import Served
from client.versions.version_files import directory, verify
from serving.engine import Engine
from serving.run_dir import ALIASES
from serving.supervisor import Supervisor
from umbel.adapter import AdapterRef
from umbel.errors import EngineError
from umbel.faults import AliasChange, Point, reach
from umbel.site.config import SiteConfig

DRAIN_POLL_S = 0.2
"""Seconds between two questions whether a version still answers a request."""

logger = logging.getLogger(__name__)


class Loading:
    """Brings the engine to what the journal says, and never the other way round."""

    def __init__(self, config: SiteConfig, journal: Journal, supervisor: Supervisor, served: Served) -> None:
        self._config = config
        self._journal = journal
        self._supervisor = supervisor
        self._served = served

    async def ensure_loaded(self, engine: Engine, ref: AdapterRef) -> None:
        """Load and warm a version that the engine lacks. Raises AdapterError, EngineError, HTTPError."""
        if ref not in self._supervisor.loaded:
            folder = verify(self._config, self._journal.get(ref))  # SGLang must not read changed files
            reach(Point.LOAD_BEGUN)
            await engine.client.load(ref, folder)
            await engine.client.warm(ref)
            self._supervisor.loaded.add(ref)
            reach(Point.LOAD_DONE)

    async def prefill(self, engine: Engine, ref: AdapterRef) -> None:
        """Compute the most used prompt prefixes in advance. A failure is logged: users only wait a little longer."""
        if not self._config.shadow.warm_prefixes:
            return
        try:
            done = await engine.client.prefill(ref, self._config.shadow.warm_prefixes)
            logger.info("adapter.prefilled ref=%s prefixes=%d", ref, done)
        except (EngineError, httpx.HTTPError) as error:
            logger.warning("adapter.prefill ref=%s failed: %s", ref, type(error).__name__)

    async def publish_table(self, change: AliasChange) -> None:
        """Write the journal's alias table to the file that an engine reads at its start, then to the router.

        Raises EngineError where the router refuses it; an engine that has gone away is no error.
        """
        self._served.table(self._supervisor.loaded).write(self._config.site.state_dir / ALIASES)
        reach(change.written)
        engine = self._supervisor.engine
        if engine is not None:  # else the next one reads the file at its start
            try:
                await engine.client.reload_aliases()
            except httpx.HTTPError:
                logger.warning("the engine went away during an alias change; the next one starts with the new table")
        reach(change.told)

    async def retire(self, ref: AdapterRef) -> None:
        """Unload a version that users cannot ask for, once its last request has ended; then remove its files."""
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
        # SGLang would load an unloaded adapter again from its old path, so the path must not exist.
        shutil.rmtree(directory(self._config, ref), ignore_errors=True)
        reach(Point.RETIRE_REMOVED)
        logger.info("adapter.unloaded ref=%s", ref)
