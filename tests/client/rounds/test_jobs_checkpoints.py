"""A round that is cut off goes on from its checkpoint, on the same data only, and leaves none when it is over."""

import asyncio
from pathlib import Path

import pytest

from client.rounds import jobs
from client.rounds.attempts import MAX_ATTEMPTS, MAX_EXCUSED
from serving.checkpoint import CheckpointHeader
from tests.client.rounds.test_jobs_fresh_data import newer
from tests.toys.cotrainer import Queue, Run, Story, ToyCoTrainer
from tests.toys.deployment import until
from umbel.errors import CoTrainerSilent, NoRoom
from umbel.messages import JobState


@pytest.fixture
def checkpoint(tmp_path: Path, cotrainer: ToyCoTrainer) -> Path:
    """The file of round r1, which leaves one at step 3, and is not done before it is told so."""
    cotrainer.reaches = 3
    return tmp_path / "rounds" / "support" / "r1" / "checkpoint.safetensors"


async def begun(queue: Queue, key: str = "r1") -> None:
    queue.cotrainer.hold = asyncio.Event()
    queue.submit(key)
    await until(lambda: queue.cotrainer.started == [key])


async def done(queue: Queue, key: str = "r1") -> None:
    queue.cotrainer.hold.set()
    assert (await queue.ended(key)).state is JobState.DONE


def test_a_round_whose_engine_dies_goes_on_from_its_checkpoint_and_leaves_none(
    run: Run, cotrainer: ToyCoTrainer, checkpoint: Path
) -> None:
    async def story(queue: Queue) -> None:
        await begun(queue)
        await queue.restart_engine()
        await until(lambda: cotrainer.found == [0, 3])
        await done(queue)
        await until(lambda: not checkpoint.exists())
        assert [job.checkpoint_s for job in cotrainer._jobs.values() if hasattr(job, "checkpoint_s")] == [30.0]

    run(story)


def test_after_a_restart_of_the_daemon_a_round_goes_on_too(run: Run, cotrainer: ToyCoTrainer, checkpoint: Path) -> None:
    async def second(queue: Queue) -> None:
        cotrainer.forget()
        await until(lambda: cotrainer.found == [0, 3])
        await done(queue)

    run(begun)
    assert CheckpointHeader.read(checkpoint).steps == 3
    run(second)
    assert not checkpoint.exists()


def test_on_other_data_a_round_begins_again_and_says_why(
    run: Run, cotrainer: ToyCoTrainer, checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = (newer(tmp_path, name, 11) for name in "ab")

    async def story(queue: Queue) -> None:
        queue.jobs.data.adopt(first)
        await begun(queue)
        queue.jobs.data.adopt(second)
        await queue.restart_engine()
        await until(lambda: cotrainer.found == [0, 0])
        await done(queue)

    run(story)
    assert cotrainer.trained_on == ["a" * 64, "b" * 64]
    assert "round.anew key=r1 after a break it begins again: its data has changed" in caplog.text


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def test_a_damaged_checkpoint_is_removed(
    run: Run, cotrainer: ToyCoTrainer, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(queue: Queue) -> None:
        await begun(queue)
        truncate(checkpoint)
        await queue.restart_engine()
        await until(lambda: cotrainer.found == [0, 0])
        await done(queue)

    run(story)
    assert "begins again" in caplog.text
    assert "damaged" in caplog.text


async def cancelled(queue: Queue) -> None:
    await queue.jobs.cancel("r1")


async def failed(queue: Queue) -> None:
    queue.cotrainer.fails_with = "the loss is nan"
    queue.cotrainer.hold.set()
    await queue.ended("r1")


async def given_up(queue: Queue) -> None:
    for attempt in range(2, MAX_ATTEMPTS + 2):
        await queue.restart_engine()
        await until(lambda attempt=attempt: len(queue.cotrainer.started) == attempt)  # type: ignore[misc]
    await queue.restart_engine()
    await queue.ended("r1")


async def cancelled_in_vain(queue: Queue) -> None:
    """The co-trainer is silent, and its engine is ended soon."""
    queue.cotrainer.cancel = silent
    with pytest.raises(CoTrainerSilent):
        await queue.jobs.cancel("r1")


async def silent(job: str) -> None:
    raise CoTrainerSilent("no answer")


@pytest.mark.parametrize("end", [cancelled, failed, given_up, cancelled_in_vain], ids=lambda end: end.__name__)
def test_a_round_that_ends_in_another_way_leaves_no_checkpoint_either(run: Run, checkpoint: Path, end: Story) -> None:
    def left() -> list[str]:
        return [path.name for path in checkpoint.parent.iterdir() if "checkpoint" in path.name]

    async def story(queue: Queue) -> None:
        await begun(queue)
        assert left() == [checkpoint.name]
        checkpoint.with_name(f".{checkpoint.name}.tmp").touch()  # of an engine that died while it wrote
        await end(queue)
        assert queue.jobs.report("r1").state.final
        await until(lambda: left() == [])

    run(story)


def test_what_a_crash_left_of_a_round_that_is_over_goes_at_the_next_start(run: Run, checkpoint: Path) -> None:
    async def first(queue: Queue) -> None:
        await begun(queue)
        await done(queue)

    async def second(queue: Queue) -> None:
        await until(lambda: not checkpoint.exists())

    run(first)
    checkpoint.touch()
    run(second)


def test_attempts_that_got_further_do_not_count_up_to_a_bound(run: Run, cotrainer: ToyCoTrainer) -> None:
    async def story(queue: Queue) -> None:
        cotrainer.reaches = 1
        await begun(queue)
        for attempt in range(2, MAX_EXCUSED + MAX_ATTEMPTS + 1):
            cotrainer.reaches = attempt
            await queue.restart_engine()
            await until(lambda attempt=attempt: len(cotrainer.started) == attempt)  # type: ignore[misc]
        await queue.restart_engine()
        report = await queue.ended("r1")
        assert f"given up after {MAX_EXCUSED + MAX_ATTEMPTS} attempts" in report.error

    run(story)


@pytest.mark.parametrize("further", [True, False])
def test_daemons_that_die_count_only_where_the_round_got_no_further(
    run: Run, cotrainer: ToyCoTrainer, checkpoint: Path, further: bool
) -> None:
    async def first(queue: Queue) -> None:
        await begun(queue)

    async def next_one(queue: Queue) -> None:
        cotrainer.forget()
        cotrainer.reaches = len(cotrainer.found) + 10 if further else 3
        before = len(cotrainer.found)
        await until(lambda: len(cotrainer.found) > before or queue.jobs.report("r1").state.final)

    run(first)
    for _ in range(MAX_ATTEMPTS + 2):
        run(next_one)
    assert len(cotrainer.found) == (MAX_ATTEMPTS + 3 if further else 1 + MAX_ATTEMPTS)


def test_an_engine_that_dies_at_the_same_step_each_time_probably_dies_of_the_round(
    run: Run, cotrainer: ToyCoTrainer, checkpoint: Path
) -> None:
    async def story(queue: Queue) -> None:
        await begun(queue)
        for attempt in range(2, MAX_ATTEMPTS + 2):
            await queue.restart_engine()
            await until(lambda attempt=attempt: len(cotrainer.started) == attempt)  # type: ignore[misc]
        await queue.restart_engine()
        report = await queue.ended("r1")
        assert f"given up after {1 + MAX_ATTEMPTS} attempts" in report.error, "only the first one got further"

    run(story)


def test_a_round_has_room_for_two_checkpoints(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def full(state_dir: Path, needed: int, what: str) -> None:
        asked.append(needed)
        raise NoRoom(what)

    async def story(queue: Queue) -> None:
        monkeypatch.setattr(jobs, "require_room", full)
        for checkpoint_bytes in (0, 100):
            queue.jobs._checkpoint_bytes = checkpoint_bytes
            with pytest.raises(NoRoom):
                queue.submit("r1")
        assert asked[1] - asked[0] == 200

    run(story)
