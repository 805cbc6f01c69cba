"""A job is followed through silences of its engine: a hang ends one attempt, and a dumb co-trainer is left."""

import asyncio

import pytest

from client.rounds.attempts import MAX_ATTEMPTS, MAX_EXCUSED
from client.rounds.following import Following
from serving.trainer_socket import REPLY_TIMEOUT_S
from tests.toys.cotrainer import Queue, Run
from tests.toys.deployment import until
from umbel.errors import CoTrainerSilent
from umbel.messages import JobState

SILENCES = 5
"""Questions that a hung engine leaves unanswered before the supervisor ends it."""
FOR_GOOD = 10**6


@pytest.mark.parametrize("silences", [1, SILENCES])
def test_a_silence_that_ends_is_part_of_the_attempt(run: Run, silences: int) -> None:
    async def story(queue: Queue) -> None:
        queue.cotrainer.silent = silences
        queue.submit("r1")
        await until(lambda: queue.jobs.report("r1").steps == 1 or queue.jobs.report("r1").state.final)
        queue.cotrainer.silent = silences
        assert (await queue.ended("r1")).state is JobState.DONE
        assert queue.journal.rounds("support").begun("r1") == 1

    run(story)


def test_a_hang_under_a_users_request_ends_one_attempt_that_does_not_count(run: Run) -> None:
    async def story(queue: Queue) -> None:
        queue.cotrainer.hold = asyncio.Event()
        queue.submit("r1")
        for attempt in range(1, MAX_EXCUSED + 1):
            await until(lambda attempt=attempt: len(queue.cotrainer.started) == attempt)  # type: ignore[misc]
            queue.cotrainer.silent = SILENCES
            await until(lambda: not queue.cotrainer.silent)
            assert queue.journal.rounds("support").begun("r1") == attempt
            await queue.restart_engine(under_a_user=True)
        queue.cotrainer.hold.set()
        assert (await queue.ended("r1")).state is JobState.DONE
        assert queue.journal.rounds("support").begun("r1") == MAX_EXCUSED + 1

    run(story)


def test_a_cotrainer_that_is_silent_in_an_engine_that_lives_costs_the_round_an_attempt(run: Run) -> None:
    async def story(queue: Queue) -> None:
        queue.cotrainer.silent = FOR_GOOD
        queue.submit("r1")
        report = await queue.ended("r1")
        assert (report.state, queue.supervisor.starts) == (JobState.FAILED, 1)
        assert f"given up after {MAX_ATTEMPTS} attempts" in report.error
        patience = Following(queue.supervisor, queue.cotrainer).patience
        assert FOR_GOOD - queue.cotrainer.silent == MAX_ATTEMPTS * patience
        assert patience * REPLY_TIMEOUT_S >= queue.supervisor.longest_hang_s, "a hang is found before"
        with pytest.raises(CoTrainerSilent):
            await queue.jobs.evaluate(queue.jobs.data.current, None)
        queue.cotrainer.silent = 0
        queue.submit("r2")
        assert (await queue.ended("r2")).state is JobState.DONE, "the next round is not held up"

    run(story)
