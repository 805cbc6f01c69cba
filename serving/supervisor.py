"""`Supervisor`: keep a site's engine running, and start it again with the live version when it dies or hangs."""

import asyncio
import logging
import time
from collections.abc import Collection, Coroutine
from pathlib import Path
from typing import Any, Protocol, TypeVar

import httpx

from serving import engine_state, liveness
from serving.aliases import AliasTable
from serving.engine import Engine
from serving.engine_state import EngineState
from serving.suspects import Suspects
from serving.trainer_socket import CoTrainerClient
from umbel import faults
from umbel.adapter import EngineRef
from umbel.errors import EngineError, EngineGone, NoAnswer, TrainingError
from umbel.site.config import SiteConfig

RESTART_DELAY_S = 1.0
"""Seconds before the second try after a failed start; each further one waits twice as long."""
LONGEST_DELAY_S = 60.0
MEASURE_AGAIN_S = 5.0
"""Seconds before the latency of an engine that did not answer in time is measured again; each time twice as long."""

T = TypeVar("T")

logger = logging.getLogger(__name__)


class WhatToServe(Protocol):
    """Says what an engine has to serve; the Supervisor asks at each start."""

    def what_to_serve(self, loaded: Collection[EngineRef]) -> tuple[AliasTable, dict[EngineRef, Path]]:
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
        self.loaded: set[EngineRef] = set()
        """Versions that are in the running engine."""
        self.deaths_under_users = 0
        """Engines that died or hung while a user's request was in flight."""
        self._state: EngineState | None = None
        self._suspects = Suspects()
        self.starts = 0
        """Engines that became ready."""
        self.started_at: float | None = None
        """Unix time at which the engine last became ready."""

    @property
    def engine(self) -> Engine | None:
        """The engine, or None while none answers."""
        return self._engine if self._available.is_set() else None

    @property
    def longest_hang_s(self) -> float:
        """Seconds within which an engine that computes nothing is found to hang and ended, also while it loads."""
        return 3 * self._config.engine.hang_timeout_s

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
            except (EngineError, OSError) as error:  # such as a full disk
                if self.starts == 0:
                    raise
                if self._engine is not None:
                    await self._engine.stop(drain_s=0)  # one that lives, and is late, holds the port of the next one
                if self._state is not None and isinstance(error, NoAnswer):
                    self._state.clear_in_flight()  # it was late, and lived until it was ended here
                self._judge_requests()
                logger.exception("the engine did not come back; next try in %.0f s", delay)
                await asyncio.sleep(delay)
                delay = min(2 * delay, LONGEST_DELAY_S)
                continue
            delay = RESTART_DELAY_S
            assert self._engine is not None
            measuring = asyncio.create_task(self._measure(self._engine))
            try:
                status = await self._ended(self._engine)
            finally:
                measuring.cancel()
            self._judge_requests()
            self._lost()
            logger.error("engine.died site=%s status=%s; starting it again", self._config.site.name, status)
            await self._engine.stop(drain_s=0)

    async def _ended(self, engine: Engine) -> int:
        """Wait until the engine ends, or hangs and is killed; return its exit status."""
        timeout_s = self._config.engine.hang_timeout_s
        assert self._state is not None
        watching = asyncio.create_task(liveness.watch(engine.client, self._state, timeout_s))
        ending = asyncio.create_task(engine.wait())
        try:
            await asyncio.wait({watching, ending}, return_when=asyncio.FIRST_COMPLETED)
            if not ending.done():
                logger.error("engine.hung site=%s: %s; it is killed", self._config.site.name, watching.result())
                engine.kill()
            return await ending
        finally:
            for task in (watching, ending):
                task.cancel()

    def _judge_requests(self) -> None:
        """Note which requests an engine that is dead was answering, and have the next ones refuse those that ended it.

        Call it before anybody is told of the death.
        """
        if self._state is None or not (in_flight := self._state.in_flight()):
            return
        self._state.clear_in_flight()
        self.deaths_under_users += 1
        refused = self._suspects.engine_died(in_flight, self._state.answered(), time.time())
        logger.warning(
            "engine.suspects site=%s in_flight=%d refused=%d %s",
            self._config.site.name, len(in_flight), len(refused), " ".join(one.hex() for one in refused),
        )  # fmt: skip

    async def _start(self) -> None:
        state_dir = self._config.site.state_dir
        if self._state is None:
            self._state = EngineState.create(state_dir / engine_state.FILE)
        self._suspects.write(state_dir, time.time())
        table, adapters = self._served.what_to_serve(self.loaded)
        self._engine = Engine(self._config)
        faults.kill_engine_with(self._engine.kill)
        logger.info("engine.starting site=%s log=%s", self._config.site.name, self._engine.log)
        try:
            await self._engine.start(table, adapters)
            self.loaded = set(adapters)
            await self._catch_up(self._engine, table)
        except httpx.HTTPError as error:
            raise EngineError(f"{self._config.site.name}: SGLang went away while starting ({error!r})") from error
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
        delay = MEASURE_AGAIN_S
        while True:
            try:
                status = await self._cotrainer.status()
                if not status.latency_known and not status.error:
                    logger.info("engine.measuring site=%s", self._config.site.name)
                    await engine.client.measure()
                return
            except NoAnswer as late:  # it is busy; without the measurement there would be no training beside users
                logger.warning(
                    "engine.measuring site=%s delayed: %s; again in %.0f s", self._config.site.name, late, delay
                )
            except (EngineError, TrainingError, httpx.HTTPError):  # the engine serves all the same
                logger.exception("the latency of %s's engine could not be measured", self._config.site.name)
                return
            await asyncio.sleep(delay)
            delay = min(2 * delay, LONGEST_DELAY_S)

    async def stop(self) -> None:
        """Drain, then end the engine. Cancel `run` first."""
        self._lost()
        if self._engine is not None:
            await self._engine.stop(self._config.engine.drain_s)

    def _lost(self) -> None:
        self._available.clear()
        self._gone.set()
        self.loaded = set()  # a table for the next engine must not send users to versions it lacks
