"""`Measured`: trains an adapter's rounds as long as it pays, on what is worth training, or says why nothing is.

order ──data and version are those of the last look──► skipped, at once
      ──one evaluation──► decide ──nothing──► skipped
                                 ──something──► bursts ──► the best of them, if it pays; else skipped
"""

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

from client.data.prepare import Prepared
from client.rounds.following import Following
from client.rounds.journal import lineage_of
from client.rounds.measured_round import MeasuredRound, Note, Trained, skipped
from client.worth import memory
from client.worth.decision import unchanged
from client.worth.look import Look
from client.worth.row_keys import RowKeys
from client.worth.worth_set import LEAST
from serving.trainer_socket import CoTrainerStatus, EvaluateJob, TrainJob
from umbel.errors import DataError
from umbel.messages import JobState, RoundOrder

logger = logging.getLogger(__name__)


class Measured:
    """Trains the rounds of one adapter; what it remembers is in `folder`.

    `everything`: it looks at nothing, and trains for as long as the order says. `judged` tells whether the site was
    sent the version of a round, by lineage and number.

    >>> trained = await measured.train(order, job, data, note)
    >>> trained.skipped or job.output
    """

    def __init__(
        self, following: Following, adapter: str, folder: Path, *, everything: bool,
        judged: Callable[[str, int], bool] = lambda lineage, number: True, clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self._following = following
        self._adapter = adapter
        self._folder = folder
        self._everything = everything
        self._judged = judged
        self._clock = clock
        self._running = ""
        """The co-trainer's name of the job that it works on now; empty where there is none."""
        self._stopped: set[str] = set()
        """The co-trainer's names of rounds of which no further job is begun."""
        self.told = "every example is trained, because [training].worth is all" if everything else "no round yet"
        """Outcome of the last round, in words."""

    async def train(self, order: RoundOrder, job: TrainJob, data: Prepared, note: Note) -> Trained:
        """Train a round, whose whole job is `job`; what it sends is then in the job's output.

        Raises as `Following.follow`, and TrainingError for an evaluation that stopped.
        """
        known, content = memory.read(self._folder)
        look = None
        if not self._everything and data.objective == "sft":
            try:
                look = await asyncio.to_thread(lambda: Look.at(RowKeys.read(data.keys), data.domains, content))
            except DataError as error:
                return Trained(JobState.FAILED, str(error))
        if look is None or not look.sets.known:
            self._tell_everything(data, look)
            return Trained.of(await self._follow(job, note))
        here = (order.parent, data.folder.name)
        if known.unadopted and ((known.parent, known.data) != here or not self._judged(lineage_of(order), known.round)):
            known = known.model_copy(update={"unadopted": 0, "reason": ""})
        if why := unchanged(known, *here, self._clock()):
            trained = skipped(why)
        else:
            trained = await MeasuredRound(order, job, data, look, known, self._follow, note, self._clock).run()
        self.told = trained.told or self.told
        return trained

    def stop(self, job: str) -> str:
        """Begin no further job of a round, by the co-trainer's name of its whole job; return the name to cancel."""
        self._stopped.add(job)
        return self._running if self._running.startswith(f"{job}.") else job

    def remember(self, trained: Trained) -> None:
        """Keep what a round has taught, once the journal has how it ended."""
        if trained.memory is not None:
            memory.write(self._folder, trained.memory, trained.content)

    async def _follow(self, job: TrainJob | EvaluateJob, note: Note) -> CoTrainerStatus:
        if job.id.partition(".")[0] in self._stopped:
            return CoTrainerStatus(job=job.id, state=JobState.CANCELLED, error="cancelled")
        self._running = job.id
        try:
            return await self._following.follow(job, note)
        finally:
            self._running = ""

    def _tell_everything(self, data: Prepared, look: Look | None) -> None:
        if self._everything:
            return
        told = "every pair of answers is trained: only what examples with one answer bring is measured"
        if look is not None:
            told = (
                f"every example is trained: of {data.train_examples}, fewer than {LEAST} could be set aside to measure "
                "it"
            )
        if told != self.told:
            logger.info("worth.unknown adapter=%s %s", self._adapter, told)
        self.told = told
