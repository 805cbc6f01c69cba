"""Keeps a site's engine running: start, watch, and after a death start again with what is live now."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import httpx

from serving.aliases import AliasTable
from serving.engine import Engine
from serving.trainer_socket import CoTrainerClient
from umbel import faults
from umbel.adapter import AdapterRef
from umbel.config import SiteConfig
from umbel.errors import EngineError, EngineGone, TrainingError

RESTART_DELAY_S = 1.0
LONGEST_DELAY_S = 60.0

T = TypeVar("T")

logger = logging.getLogger(__name__)

WhatToServe = Callable[[], tuple[AliasTable, dict[AdapterRef, Path]]]
"""The alias table and the versions to load, asked for at each start."""


class Supervisor:
    """Whoever needs the engine asks `ready()`, and asks again after a failure."""

    def __init__(self, config: SiteConfig, cotrainer: CoTrainerClient, what_to_serve: WhatToServe) -> None:
        self._config = config
        self._cotrainer = cotrainer
        self._what_to_serve = what_to_serve
        self._available, self._gone = asyncio.Event(), asyncio.Event()
        self._engine: Engine | None = None
        self.loaded: set[AdapterRef] = set()
        """Versions that are in the running engine."""
        self.starts = 0
        self.started_at: float | None = None
        """Unix time at which the engine last became ready."""

    @property
    def engine(self) -> Engine | None:
        """The engine, if it answers now."""
        return self._engine if self._available.is_set() else None

    async def ready(self) -> Engine:
        """The engine, once it answers."""
        await self._available.wait()
        assert self._engine is not None
        return self._engine

    async def while_running(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`; raises EngineGone as soon as the engine is gone: nobody waits for a dead one."""
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
        """Until cancelled. Raises EngineError if the very first start fails: then the site file is wrong."""
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
        table, adapters = self._what_to_serve()
        self._engine = Engine(self._config)
        faults.aim(self._engine.kill)
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
        """Serve what was promoted while the engine was starting."""
        while (wanted := self._what_to_serve())[0] != table:
            table, adapters = wanted
            for ref in adapters.keys() - self.loaded:
                await engine.client.load(ref, adapters[ref])
                await engine.client.warm(ref)
                self.loaded.add(ref)
            await engine.client.reload_aliases()

    async def _measure(self, engine: Engine) -> None:
        """Unless an earlier start did: without it the co-trainer would train only while nobody is served."""
        try:
            status = await self._cotrainer.status()
            if not status.latency_known and not status.error:
                logger.info("engine.measuring site=%s", self._config.site.name)
                await engine.client.measure()
        except (TrainingError, httpx.HTTPError):  # it serves, and that is what it is for
            logger.exception("the latency of %s's engine could not be measured", self._config.site.name)

    async def stop(self) -> None:
        """Drain, then end the engine. Cancel `run` first."""
        self._lost()
        if self._engine is not None:
            await self._engine.stop(self._config.engine.drain_s)

    def _lost(self) -> None:
        self._available.clear()
        self._gone.set()
        self.loaded = set()  # the next engine's table must not send users to what it has not
