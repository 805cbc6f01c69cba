"""`Supervisor`: keep a site's engine running, and start it again with the live version when it dies."""

import asyncio
import logging
import time
from collections.abc import Collection, Coroutine
from pathlib import Path
from typing import Any, Protocol, TypeVar

import httpx

from serving.aliases import AliasTable
from serving.engine import Engine
from serving.trainer_socket import CoTrainerClient
from umbel import faults
from umbel.adapter import AdapterRef
from umbel.errors import EngineError, EngineGone, TrainingError
from umbel.site.config import SiteConfig

RESTART_DELAY_S = 1.0
"""Seconds before the second try after a failed start; each further one waits twice as long."""
LONGEST_DELAY_S = 60.0

T = TypeVar("T")

logger = logging.getLogger(__name__)


class WhatToServe(Protocol):
    """Says what an engine has to serve; the Supervisor asks at each start."""

    def what_to_serve(self, loaded: Collection[AdapterRef]) -> tuple[AliasTable, dict[AdapterRef, Path]]:
        """Return the alias table, and the versions to load with their folders. `loaded` are in the engine already."""
        ...


class Supervisor:
    """Runs one engine after the other. Callers await `ready()` for the engine, and again after a failure."""

    def __init__(self, config: SiteConfig, cotrainer: CoTrainerClient, served: WhatToServe) -> None:
        self._config = config
        self._cotrainer = cotrainer
        self._served = served
        self._available, self._gone = asyncio.Event(), asyncio.Event()
        self._engine: Engine | None = None
        self.loaded: set[AdapterRef] = set()
        """Versions that are in the running engine."""
        self.starts = 0
        """Engines that became ready."""
        self.started_at: float | None = None
        """Unix time at which the engine last became ready."""

    @property
    def engine(self) -> Engine | None:
        """The engine, or None while none answers."""
        return self._engine if self._available.is_set() else None

    async def ready(self) -> Engine:
        """Wait for an engine that answers, and return it."""
        await self._available.wait()
        assert self._engine is not None
        return self._engine

    async def while_running(self, work: Coroutine[Any, Any, T]) -> T:
        """Await `work` and return its result; raise EngineGone as soon as the engine is gone."""
        task, gone = asyncio.ensure_future(work), asyncio.ensure_future(self._gone.wait())
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise EngineGone(f"{self._config.site.name}: the engine went away")
        finally:
            task.cancel()
            gone.cancel()

    async def run(self) -> None:
        """Keep an engine running until cancelled.

        Raises EngineError if the very first start fails: then the site file is wrong.
        """
        delay = RESTART_DELAY_S
        while True:
            try:
                await self._start()
            except EngineError:
                if self.starts == 0:
                    raise
                logger.exception("the engine did not come back; next try in %.0f s", delay)
                await asyncio.sleep(delay)
                delay = min(2 * delay, LONGEST_DELAY_S)
                continue
            delay = RESTART_DELAY_S
            assert self._engine is not None
            measuring = asyncio.create_task(self._measure(self._engine))
            try:
                status = await self._engine.wait()
            finally:
                measuring.cancel()
            self._lost()
            logger.error("engine.died site=%s status=%s; starting it again", self._config.site.name, status)
            await self._engine.stop(drain_s=0)

    async def _start(self) -> None:
        table, adapters = self._served.what_to_serve(self.loaded)
        self._engine = Engine(self._config)
        faults.kill_engine_with(self._engine.kill)
        logger.info("engine.starting site=%s log=%s", self._config.site.name, self._engine.log)
        await self._engine.start(table, adapters)
        self.loaded = set(adapters)
        await self._catch_up(self._engine, table)
        self.starts += 1
        self.started_at = time.time()
        self._gone.clear()
        self._available.set()
        logger.info("engine.ready site=%s url=%s", self._config.site.name, self._engine.client.url)

    async def _catch_up(self, engine: Engine, table: AliasTable) -> None:
        """Load and serve versions that were promoted while the engine was starting."""
        while (wanted := self._served.what_to_serve(self.loaded))[0] != table:
            table, adapters = wanted
            for ref in adapters.keys() - self.loaded:
                await engine.client.load(ref, adapters[ref])
                await engine.client.warm(ref)
                self.loaded.add(ref)
            await engine.client.reload_aliases()

    async def _measure(self, engine: Engine) -> None:
        """Measure the engine's latency unless an earlier start did.

        Without it the co-trainer would train only while no request is served.
        """
        try:
            status = await self._cotrainer.status()
            if not status.latency_known and not status.error:
                logger.info("engine.measuring site=%s", self._config.site.name)
                await engine.client.measure()
        except (TrainingError, httpx.HTTPError):  # the engine serves all the same
            logger.exception("the latency of %s's engine could not be measured", self._config.site.name)

    async def stop(self) -> None:
        """Drain, then end the engine. Cancel `run` first."""
        self._lost()
        if self._engine is not None:
            await self._engine.stop(self._config.engine.drain_s)

    def _lost(self) -> None:
        self._available.clear()
        self._gone.set()
        self.loaded = set()  # a table for the next engine must not send users to versions it lacks
