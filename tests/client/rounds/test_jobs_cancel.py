"""Rounds that are cancelled, and evaluations that share the co-trainer with them."""

import asyncio
from pathlib import Path

import pytest

from tests.toys.cotrainer import PARENT, Queue, Run, ToyCoTrainer, order
from tests.toys.deployment import until
from umbel.errors import EngineGone, NotFound, TrainingError
from umbel.messages import JobState


def test_a_running_round_is_cancelled_and_the_next_one_runs(run: Run) -> None:
    async def story(queue: Queue) -> None:
        queue.cotrainer.hold = asyncio.Event()
        queue.submit("r1")
        await until(lambda: queue.jobs.report("r1").steps == 1)
        for _ in range(2):
            assert (await queue.jobs.cancel("r1")).state is JobState.CANCELLED, "twice is no change"
        assert queue.cotrainer.cancelled == ["r1"]
        queue.cotrainer.hold.set()
        queue.submit("r2")
        assert (await queue.ended("r2")).state is JobState.DONE
        assert queue.jobs.report("r1").state is JobState.CANCELLED
        assert queue.submit("r1", PARENT).state is JobState.CANCELLED
        with pytest.raises(TrainingError, match="round r1 is cancelled"):
            queue.jobs.update("r1")

    run(story)


def test_a_round_that_has_ended_stays_as_it_is(run: Run) -> None:
    async def story(queue: Queue) -> None:
        queue.submit("r1")
        report = await queue.ended("r1")
        assert await queue.jobs.cancel("r1") == report
        with pytest.raises(NotFound):
            await queue.jobs.cancel("unknown")
        assert queue.cotrainer.cancelled == []

    run(story)


def test_a_newer_round_ends_the_open_ones_of_its_registry(run: Run) -> None:
    async def story(queue: Queue) -> None:
        queue.cotrainer.hold = asyncio.Event()
        for key in ("mine-1-p", "mine-2-p", "other-1-p"):
            queue.submit(key, round=int(key.split("-")[1]))
        await until(lambda: queue.jobs.report("mine-1-p").steps == 1)
        queue.submit("mine-3-p", round=3)
        await queue.jobs.supersede(order("mine-3-p", round=3))
        queue.cotrainer.hold.set()
        assert (await queue.ended("mine-3-p")).state is JobState.DONE
        assert (await queue.ended("other-1-p")).state is JobState.DONE
        for key in ("mine-1-p", "mine-2-p"):
            report = queue.jobs.report(key)
            assert (report.state, report.error) == (JobState.CANCELLED, "superseded by round 3")
        assert queue.cotrainer.started == ["mine-1-p", "other-1-p", "mine-3-p"]

    run(story)


def test_a_round_that_is_cancelled_in_the_queue_never_runs(run: Run) -> None:
    async def story(queue: Queue) -> None:
        queue.cotrainer.hold = asyncio.Event()
        queue.submit("r1")
        queue.submit("r2")
        await until(lambda: queue.cotrainer.started == ["r1"])
        assert (await queue.jobs.cancel("r2")).state is JobState.CANCELLED
        queue.cotrainer.hold.set()
        await queue.ended("r1")
        queue.submit("r3")
        await queue.ended("r3")
        assert queue.jobs.report("r2").state is JobState.CANCELLED
        assert queue.cotrainer.started == ["r1", "r3"]

    run(story)


def test_a_round_that_is_cancelled_while_the_engine_is_away_never_runs(run: Run) -> None:
    async def story(queue: Queue) -> None:
        await until(lambda: queue.supervisor.engine is not None)
        queue.machine.gates["start"] = asyncio.Event()
        queue.machine.kill()
        await until(lambda: queue.supervisor.engine is None)
        queue.submit("r1")
        await asyncio.sleep(0.05)
        assert (await queue.jobs.cancel("r1")).state is JobState.CANCELLED
        queue.machine.gates["start"].set()
        queue.submit("r2")
        await queue.ended("r2")
        assert queue.jobs.report("r1").state is JobState.CANCELLED
        assert queue.cotrainer.started == ["r2"]

    run(story)


@pytest.mark.parametrize(("adapter", "loss"), [(Path("/adapters/support-v1"), 1.0), (None, 2.0)])
@pytest.mark.parametrize(("guard", "data"), [(None, "eval.npy"), ("triage", "guard-triage.npy")])
def test_an_evaluation_is_the_cotrainers_and_leaves_nothing_behind(
    run: Run, tmp_path: Path, adapter: Path | None, loss: float, guard: str | None, data: str
) -> None:
    async def story(queue: Queue) -> None:
        found = await queue.jobs.evaluate(queue.jobs.data.current, adapter, guard)
        assert (found.sums.loss, len(found)) == (loss, 40)
        assert queue.cotrainer.evaluated == [data]
        assert list((tmp_path / "rounds" / "support").iterdir()) == []

    run(story)


def test_an_evaluation_that_stops_says_why(run: Run, cotrainer: ToyCoTrainer) -> None:
    async def story(queue: Queue) -> None:
        for reason in ("no such file", "out of memory"):
            cotrainer.fails_with = reason
            with pytest.raises(TrainingError, match=f"evaluation stopped: {reason}"):
                await queue.jobs.evaluate(queue.jobs.data.current, None)

    run(story)


def test_an_evaluation_whose_engine_dies_says_so(run: Run, cotrainer: ToyCoTrainer) -> None:
    async def story(queue: Queue) -> None:
        cotrainer.hold = asyncio.Event()
        evaluation = asyncio.create_task(queue.jobs.evaluate(queue.jobs.data.current, None))
        await until(lambda: cotrainer.started == ["evaluate-1"])
        await queue.restart_engine()
        with pytest.raises(EngineGone):
            await evaluation

    run(story)


def test_a_verdict_waits_for_no_round(run: Run, cotrainer: ToyCoTrainer) -> None:
    async def story(queue: Queue) -> None:
        cotrainer.polls = 10**9
        for key in ("r1", "r2"):
            queue.submit(key)
        await until(lambda: cotrainer.started == ["r1"])
        cotrainer.polls = 5
        evaluations = await asyncio.gather(*(queue.jobs.evaluate(queue.jobs.data.current, None) for _ in range(3)))
        assert len(evaluations) == 3
        assert queue.jobs.report("r1").state is JobState.RUNNING
        assert queue.jobs.report("r2").state is JobState.QUEUED, "an adapter's own rounds come one after the other"
        assert sorted(cotrainer.started) == ["evaluate-1", "evaluate-2", "evaluate-3", "r1"]

    run(story)
