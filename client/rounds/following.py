"""`Following`: start a job at the co-trainer and follow it to its end, through silences of one engine."""

import asyncio
import math
from collections.abc import Callable, Coroutine
from typing import Any

from serving.supervisor import Supervisor
from serving.trainer_socket import REPLY_TIMEOUT_S, CoTrainerClient, CoTrainerStatus, EvaluateJob, TrainJob
from umbel.errors import CoTrainerSilent, EngineGone
from umbel.messages import JobState

FIRST_POLL_S, POLL_S = 0.02, 0.5
"""Seconds until the first question to the co-trainer how a job stands, and between two later ones; they double between.
Evaluations and bursts are often over within a few of them."""


class Following:
    """Follows jobs; whether a silent engine lives is for the supervisor to say.

    >>> status = await Following(supervisor, cotrainer).follow(job, note=print)
    """

    def __init__(self, supervisor: Supervisor, cotrainer: CoTrainerClient) -> None:
        self._supervisor = supervisor
        self._cotrainer = cotrainer
        self.patience = math.ceil(supervisor.longest_hang_s / REPLY_TIMEOUT_S)
        """Questions in a row that an engine may leave unanswered: one that hangs is ended before."""

    async def follow(
        self, job: TrainJob | EvaluateJob, note: Callable[[CoTrainerStatus], None] = lambda status: None
    ) -> CoTrainerStatus:
        """Start a job and wait for its end; return its last status. `note` gets each one before.

        Raises EngineGone when the engine dies, and CoTrainerSilent when it lives and its co-trainer says no more.
        """
        status, pause_s = await self._ask(lambda: self._cotrainer.start(job)), FIRST_POLL_S
        while not status.state.final or status.job != job.id:
            if status.job != job.id:  # refused with a reason, or a new engine that knows no job
                if status.error:
                    return status.model_copy(update={"job": job.id, "state": JobState.FAILED})
                raise EngineGone("the engine was started anew")
            note(status)
            await asyncio.sleep(pause_s)
            pause_s = min(POLL_S, 2 * pause_s)
            status = await self._ask(lambda: self._cotrainer.status(job=job.id))
        return status

    async def _ask(self, question: Callable[[], Coroutine[Any, Any, CoTrainerStatus]]) -> CoTrainerStatus:
        """Ask until there is an answer: a question that is asked twice changes nothing."""
        unanswered = 0
        while True:
            try:
                return await self._supervisor.while_running(question())
            except CoTrainerSilent:  # in an engine that hangs: the supervisor ends it, and with it the next question
                unanswered += 1
                if unanswered >= self.patience:
                    raise


def counts(status: CoTrainerStatus) -> dict[str, int | float]:
    """Return the fields of a `RoundReport` that a job's status tells."""
    return {
        "steps": status.steps,
        "num_examples": status.examples,
        "num_loss_tokens": status.loss_tokens,
        "loss_sum": status.loss_sum,
        "seconds": status.seconds,
        "share": status.share,
    }
