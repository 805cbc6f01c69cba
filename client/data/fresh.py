"""`FreshData`: keep an adapter's token files up with its files of examples, while the site serves and trains.

    files, released examples ──look, every 2 s──► other than those in use ──prepare, in a child──► adopt ──► next round

What cannot be used is refused by name, and the data of before stays in use. No message of this module holds text of an
example.
"""

import asyncio
import json
import logging
import sqlite3
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from client.data import user_examples
from client.data.in_use import DataInUse
from client.data.prepare import Preparation, Prepared, prepare_in_child
from client.data.summary import warnings
from client.data.watched import Inputs, Watched
from umbel.errors import UmbelError
from umbel.site.config import SiteConfig

LOOK_S = 2.0
"""Seconds between two looks at the files."""
SPARE_S = 120.0
"""Seconds of preparations that may come without a rest: who changes a file now and then never waits for one."""
REST = 10.0
"""Seconds without a preparation for each further second that they took: a file that grows all the time costs at most
about a tenth of a core."""
REST_OF_A_ROUND = 1.0
"""The same while a round waits for data without deleted examples."""

logger = logging.getLogger(__name__)


class FreshData:
    """Keeps the data in use of one adapter up with its files.

    >>> fresh = await FreshData.begin(config, "support")   # raises what is wrong with the files
    >>> asyncio.create_task(fresh.keep_up())
    >>> await fresh.settle()                               # before each round
    """

    def __init__(
        self,
        config: SiteConfig,
        adapter: str,
        prepared: Prepared,
        inputs: Inputs | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.data = DataInUse(prepared)
        self._config = config
        self._adapter = adapter
        self._watched = Watched(config, adapter, clock)
        self._clock = clock
        self._used = inputs or Inputs()
        """The inputs of the data in use."""
        self._refused: tuple[Inputs, str] | None = None
        """Inputs that are not tried again as they are, and the reason."""
        self._torn = ""
        """The last reason that may be a file's that was read while it was written."""
        self._ended_at, self._owed_s = clock(), 0.0
        """When the last preparation ended, and the seconds of preparations for which there was no rest by then."""
        self._one_at_a_time = asyncio.Lock()

    @classmethod
    async def begin(cls, config: SiteConfig, adapter: str) -> "FreshData":
        """Prepare an adapter's data for the first time. Raises DataError, ConfigError, TrainingError."""
        inputs = await asyncio.to_thread(Watched(config, adapter).now)
        released = await asyncio.to_thread(user_examples.export, config, adapter)
        prepared = await prepare_in_child(preparation(config, adapter, released.file))
        _log_ready(config, adapter, prepared)
        return cls(config, adapter, prepared, replace(inputs, released=released.numbers))

    async def keep_up(self) -> None:
        """Look at the files every `LOOK_S` seconds, for ever."""
        while True:
            await asyncio.sleep(LOOK_S)
            await self._try_to_look()

    async def settle(self) -> None:
        """Return once no example that was deleted is in the data in use. A round waits for it before it begins."""
        try:
            while not await self._is_settled():
                if not self.data.rounds_wait:
                    logger.warning("round.waits adapter=%s for data without deleted examples", self._adapter)
                self.data.rounds_wait = True
                await asyncio.sleep(LOOK_S)
        finally:
            self.data.rounds_wait = False

    async def look(self, urgent: bool = False) -> None:
        """Prepare and adopt files that are other than those in use, unless one is half-written or it is too early.

        Where it is `urgent`, because a round waits, it is too early for a shorter time.
        """
        async with self._one_at_a_time:
            inputs = await asyncio.to_thread(self._watched.now)
            if inputs == self._used:
                self._refused, self._torn, self.data.refused = None, "", ""
            elif self._refused is not None and inputs == self._refused[0]:
                self._say(self._refused[1])
            elif (owed_s := self._owed(REST_OF_A_ROUND if urgent else REST)) <= SPARE_S:
                await self._prepare(inputs, owed_s)

    async def _try_to_look(self, urgent: bool = False) -> None:
        try:
            await self.look(urgent)
        except (OSError, sqlite3.Error, UmbelError) as error:  # users are served, and there will be another look
            self._say(f"the examples of {self._adapter} cannot be looked at: {error}")

    async def _is_settled(self) -> bool:
        if not await self._has_deleted():  # this waits for no preparation that is under way
            return True
        await self._try_to_look(urgent=True)
        return not await self._has_deleted()

    async def _has_deleted(self) -> bool:
        """Return whether an example is in the data in use that was deleted meanwhile, or may be."""
        try:
            return not self._used.released <= (await asyncio.to_thread(self._watched.now)).released
        except (OSError, sqlite3.Error, UmbelError):
            return True

    def _owed(self, rest: float) -> float:
        """Return the seconds of preparations for which there was no rest yet, where each takes `rest` seconds."""
        return max(0.0, self._owed_s - (self._clock() - self._ended_at) / rest)

    async def _prepare(self, inputs: Inputs, owed_s: float) -> None:
        """Prepare the files as they are, unless one is half-written; adopt what comes of it, or say what is wrong."""
        if await asyncio.to_thread(self._watched.half_written):
            return
        began = self._clock()
        try:
            with self.data.all_held() as keep:
                released = await asyncio.to_thread(user_examples.export, self._config, self._adapter)
                inputs = replace(inputs, released=released.numbers)
                wanted = preparation(self._config, self._adapter, released.file)
                wanted = replace(wanted, keep=keep, tokenizer=self.data.current.tokenizer)
                self._take(inputs, await prepare_in_child(wanted), await asyncio.to_thread(self._watched.now))
        except UmbelError as error:
            await self._refuse(inputs, str(error))
        finally:
            self._ended_at = self._clock()
            self._owed_s = owed_s + self._ended_at - began

    def _take(self, inputs: Inputs, prepared: Prepared, now: Inputs) -> None:
        """Adopt prepared data, but none with an example that was deleted meanwhile: it is prepared again."""
        if not inputs.released <= now.released:
            self.data.drop(prepared)
            return
        if prepared.folder != self.data.current.folder:
            _log_ready(self._config, self._adapter, prepared)
        self.data.adopt(prepared)
        self._used, self._refused, self._torn, self.data.refused = inputs, None, "", ""

    async def _refuse(self, inputs: Inputs, reason: str) -> None:
        """Note why inputs are not used, unless it may be that a file was read while it was written."""
        now = await asyncio.to_thread(self._watched.now)
        if now != inputs and reason != self._torn:
            self._torn = reason
            return
        self._refused = (inputs, reason)
        self._say(reason)

    def _say(self, reason: str) -> None:
        if reason != self.data.refused:
            logger.warning("data.refused adapter=%s %s; the data of before stays in use", self._adapter, reason)
        self.data.refused = reason


def preparation(config: SiteConfig, adapter: str, released: Path | None) -> Preparation:
    """Return what the token files of an adapter are made from; `released`: the examples that its users gave."""
    return Preparation(
        data=config.data(adapter),
        eval_data=config.eval_data(adapter),
        eval_fraction=config.training.eval_fraction,
        model=config.model.path,
        seq_len=config.training.seq_len,
        into=config.site.state_dir / "data" / adapter,
        guards={guard.name: guard.data for guard in config.policy(adapter).guard},
        released=released,
    )


def _log_ready(config: SiteConfig, adapter: str, data: Prepared) -> None:
    told = warnings(config, adapter, data.files, data.asked, data.withheld)
    logger.log(
        logging.WARNING if told else logging.INFO,
        "data.ready adapter=%s train=%d eval=%d withheld=%d cut=%d dropped=%d untold=%d%s",
        adapter,
        data.train_examples,
        data.eval_examples,
        sum(data.withheld.values()),
        data.cut,
        data.dropped,
        data.untold,
        "".join(f" will_bite={json.dumps(sentence)}" for sentence in told),
    )
