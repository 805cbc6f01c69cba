"""Rounds of an adapter whose data changes: each is trained on what is newest when it begins."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from client.data.prepare import Prepared
from tests.toys.cotrainer import Queue, Run, ToyCoTrainer
from tests.toys.deployment import until
from umbel.errors import DataError
from umbel.messages import JobState


def newer(state_dir: Path, name: str, examples: int) -> Prepared:
    """Write the token files of newer data, which nobody reads."""
    folder = state_dir / "data" / (name * 64)
    folder.mkdir(parents=True)
    (folder / "train.npy").touch()
    held = {"held_examples": examples, "held_loss_tokens": 5 * examples}
    return Prepared(folder / "train.npy", folder / "eval.npy", examples, 5, 50, held=held)


def test_a_round_ends_with_the_data_that_it_began_with_and_the_next_has_the_newest(
    run: Run, cotrainer: ToyCoTrainer, tmp_path: Path
) -> None:
    first, second, third = (newer(tmp_path, name, examples) for name, examples in (("a", 11), ("b", 12), ("c", 13)))

    async def story(queue: Queue) -> None:
        queue.jobs.data.adopt(first)
        cotrainer.hold = asyncio.Event()
        queue.submit("r1")
        queue.submit("r2")
        await until(lambda: cotrainer.started == ["r1"])
        for data in (second, third):
            queue.jobs.data.adopt(data)
        assert (first.train.exists(), second.train.exists()) == (True, False), "nothing uses the second"
        cotrainer.hold.set()
        reports = [await queue.ended(key) for key in ("r1", "r2")]
        assert [report.held_examples for report in reports] == [11, 13]
        assert cotrainer.trained_on == ["a" * 64, "c" * 64]
        await until(lambda: not first.folder.exists())

    run(story)


def test_an_attempt_after_the_engine_died_has_the_newest_data(
    run: Run, cotrainer: ToyCoTrainer, tmp_path: Path
) -> None:
    first, second = (newer(tmp_path, name, examples) for name, examples in (("a", 11), ("b", 12)))

    async def story(queue: Queue) -> None:
        queue.jobs.data.adopt(first)
        cotrainer.hold = asyncio.Event()
        queue.submit("r1")
        await until(lambda: cotrainer.started == ["r1"])
        queue.jobs.data.adopt(second)
        await queue.restart_engine()
        cotrainer.hold.set()
        report = await queue.ended("r1")
        assert (report.state, report.held_examples) == (JobState.DONE, 12)
        assert cotrainer.trained_on == ["a" * 64, "b" * 64]

    run(story)


def test_an_evaluation_is_on_the_data_that_it_was_given(run: Run, cotrainer: ToyCoTrainer, tmp_path: Path) -> None:
    async def story(queue: Queue) -> None:
        with queue.jobs.data.held() as data:
            queue.jobs.data.adopt(replace(data, eval=tmp_path / "newer.npy"))
            await queue.jobs.evaluate(data, None)
        await queue.jobs.evaluate(queue.jobs.data.current, None)
        assert cotrainer.evaluated == ["eval.npy", "newer.npy"]

    run(story)


def test_a_round_begins_when_its_data_is_settled_and_can_be_cancelled_before(
    run: Run, cotrainer: ToyCoTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(queue: Queue) -> None:
        settled = asyncio.Event()
        monkeypatch.setattr(queue.jobs._fresh, "settle", settled.wait)
        queue.submit("r1")
        queue.submit("r2")
        await asyncio.sleep(0.05)
        assert (cotrainer.started, queue.jobs.report("r1").state) == ([], JobState.QUEUED)
        await queue.jobs.cancel("r1")
        settled.set()
        assert (await queue.ended("r2")).state is JobState.DONE
        assert cotrainer.started == ["r2"]

    run(story)


def test_a_round_whose_data_became_pairs_fails_by_name_and_one_of_pairs_is_trained(
    run: Run, cotrainer: ToyCoTrainer, tmp_path: Path
) -> None:
    """And no order of the other objective is taken any more."""
    first, pairs = newer(tmp_path, "a", 11), replace(newer(tmp_path, "b", 12), pairs=["train", "eval"])
    mistake = 'objective = "sft", and this site\'s data is pairs of answers; run with objective = "dpo", or give'

    async def story(queue: Queue) -> None:
        queue.jobs.data.adopt(first)
        with pytest.raises(
            DataError, match='round r0: the run has objective = "dpo", and this site\'s data is examples'
        ):
            queue.submit("r0", plan={"objective": "dpo"})
        cotrainer.hold = asyncio.Event()
        queue.submit("r1")
        queue.submit("r2")
        await until(lambda: cotrainer.started == ["r1"])
        queue.jobs.data.adopt(pairs)
        cotrainer.hold.set()
        assert (await queue.ended("r1")).state is JobState.DONE
        failed = await queue.ended("r2")
        assert (failed.state, mistake in failed.error) == (JobState.FAILED, True)
        with pytest.raises(DataError, match="round r3: the run has"):
            queue.submit("r3")
        queue.submit("r4", plan={"objective": "dpo"})
        done = await queue.ended("r4")
        assert (done.state, done.objective, done.losses) == (JobState.DONE, "dpo", done.num_examples)
        assert cotrainer.started == ["r1", "r4"]

    run(story)


def test_an_evaluation_of_pairs_has_one_score_for_each(run: Run, tmp_path: Path) -> None:
    """The toy scores forty rows; those of an examples' guard stay rows."""
    data = replace(newer(tmp_path, "a", 11), pairs=["train", "eval"], guards={"triage": tmp_path / "guard-triage.npy"})
    data = replace(data, clusters={"eval": [0, 0, *range(1, 19)]})

    async def story(queue: Queue) -> None:
        scores = await queue.jobs.evaluate(data, None)
        assert (len(scores), scores.pairs, scores.sums.exact) == (20, True, 0)
        assert scores.by_cluster(scores.tokens).tolist() == [[2.0, *[1.0] * 18]]
        assert len(await queue.jobs.evaluate(data, None, "triage")) == 40

    run(story)
