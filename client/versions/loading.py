"""`Loading`: load, warm and unload versions in the running engine, and give it the alias table.

A call that gets no answer in time says nothing about what the engine did: it may still hold a version, or load it a
moment later. So nothing is taken for gone before the engine says so or is gone itself; the call is made again.
"""

import asyncio
import logging
import shutil

import httpx

from client.versions.background import Background
from client.versions.served import Served
from serving.engine import Engine
from serving.run_dir import ALIASES
from serving.supervisor import Supervisor
from umbel.adapter import AdapterRef, EngineRef
from umbel.errors import EngineError, NoAnswer, NoRoom
from umbel.faults import AliasChange, Point, reach
from umbel.site.config import SiteConfig

DRAIN_POLL_S = 0.2
"""Seconds between two questions whether a version still answers a request."""
NOTICE_S = 2.0
"""Seconds in which the supervisor notices that an engine has died, after its connections broke."""
AGAIN_S = 1.0
"""Seconds before a call that was not answered is made again; each further one waits twice as long."""
LONGEST_AGAIN_S = 60.0
TELLING = "tell the router"
"""Name of the task that makes a router, which did not answer, read the alias table."""

logger = logging.getLogger(__name__)


class Loading:
    """Brings the engine to what the journal says, and never the other way round."""

    def __init__(self, config: SiteConfig, supervisor: Supervisor, served: Served, background: Background) -> None:
        self._config = config
        self._supervisor = supervisor
        self._served = served
        self._background = background
        self._asked: dict[EngineRef, Engine] = {}
        """Version, or adapter that is only served → the engine that was asked to load it, whatever came of it."""

    async def ensure_loaded(self, engine: Engine, ref: EngineRef) -> None:
        """Load and warm what the engine lacks. Raises AdapterError, EngineError, HTTPError."""
        if ref not in self._supervisor.loaded:
            folder = self._served.verified(ref)  # SGLang must not read changed files
            reach(Point.LOAD_BEGUN)
            self._asked[ref] = engine
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

        Raises NoRoom on a full disk, and EngineError where the router refuses it. An engine that has gone away is no
        error, and one that does not answer is asked again in the background, until it has the table or another engine
        has taken its place.
        """
        file = self._config.site.state_dir / ALIASES
        try:
            self._served.table(self._supervisor.loaded).write(file)
        except OSError as error:
            raise NoRoom(
                f"{file}: cannot be written ({error.strerror}); the journal has the change, and the router gets it "
                "with the next one: make room on the disk, and ask once more"
            ) from error
        reach(change.written)
        engine = self._supervisor.engine
        if engine is not None:  # else the next one reads the file at its start
            late = await self._tell(engine)
            if late and TELLING not in self._background:
                logger.warning("aliases.delayed %s; asking again", late)
                self._background.start(TELLING, self._insist_on_table(engine))
        reach(change.told)

    async def retire(self, ref: EngineRef) -> None:
        """Unload a version that users cannot ask for, once its last request has ended; then remove its files.

        While the engine may still hold the version, its files and its place stay, and the engine is asked again. After
        a restart of the daemon the engine is another one, and `recovery.sweep` removes the files.
        """
        reach(Point.RETIRE_BEGUN)
        pause = AGAIN_S
        while why := await self._holds(ref):
            logger.warning("adapter.unload_delayed ref=%s again_s=%.0f its files stay: %s", ref, pause, why)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_AGAIN_S)
        self._asked.pop(ref, None)
        self._supervisor.loaded.discard(ref)
        reach(Point.RETIRE_UNLOADED)
        # SGLang would load an unloaded adapter again from its old path, so the path must not exist.
        shutil.rmtree(self._served.directory(ref), ignore_errors=True)
        reach(Point.RETIRE_REMOVED)
        logger.info("adapter.unloaded ref=%s", ref)

    async def is_gone(self, engine: Engine) -> bool:
        """Return whether an engine whose connection broke is gone: the supervisor notices it a moment later."""
        if self._supervisor.engine is engine:
            await asyncio.sleep(NOTICE_S)
        return self._supervisor.engine is not engine

    async def _holds(self, ref: EngineRef) -> str:
        """Try to unload a version; say why the engine may still hold it, nothing once it does not."""
        engine = self._supervisor.engine
        try:
            while engine is not None and TELLING in self._background:  # its router may still send users to the version
                await asyncio.sleep(DRAIN_POLL_S)
                engine = self._supervisor.engine
            while engine is not None and (await engine.client.in_flight()).get(str(ref)):
                await asyncio.sleep(DRAIN_POLL_S)
            if engine is not None and (ref in self._supervisor.loaded or self._asked.get(ref) is engine):
                await engine.client.unload(ref)
        except EngineError as error:
            return str(error)
        except httpx.HTTPError as error:
            if engine is not None and not await self.is_gone(engine):
                return f"the connection to the engine broke, and the engine lives ({type(error).__name__})"
        return ""

    async def _tell(self, engine: Engine) -> str:
        """Let the router read the table; return what went wrong where the engine lives and may not have read it."""
        try:
            await engine.client.reload_aliases()
        except NoAnswer as late:
            return str(late)
        except httpx.HTTPError as error:
            if not await self.is_gone(engine):
                return f"the connection to the engine broke, and the engine lives ({type(error).__name__})"
            logger.warning("the engine went away during an alias change; the next one starts with the new table")
        return ""

    async def _insist_on_table(self, engine: Engine) -> None:
        pause = AGAIN_S
        while self._supervisor.engine is engine:
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_AGAIN_S)
            try:
                late = await self._tell(engine)
            except EngineError as error:
                late = str(error)
            if not late:
                logger.info("aliases.told after a delay")
                return
            logger.warning("aliases.delayed %s; again in %.0f s", late, pause)
