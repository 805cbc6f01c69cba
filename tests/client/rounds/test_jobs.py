"""Rounds at a site: found again by their key, begun again when the engine dies, ended with a reason."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.rounds.attempts import MAX_ATTEMPTS, MAX_EXCUSED
from tests.toys.cotrainer import PARENT, Queue, Run, order
from tests.toys.deployment import HELD_BASE, RANK, adapter, until
from umbel import peft_dir
from umbel.errors import AdapterError, BaseMismatch, Conflict, NotFound, TrainingError
from umbel.messages import JobState


def test_a_round_brings_an_update_with_its_digest_and_counts(run: Run) -> None:
    async def story(queue: Queue) -> None:
        report = queue.submit("r1")
        assert (report.state, report.parent) == (JobState.QUEUED, peft_dir.digest(PARENT))
        with pytest.raises(TrainingError, match="round r1 is "):
            queue.jobs.update("r1")
        report = await queue.ended("r1")
        assert (report.state, report.error, report.rank) == (JobState.DONE, "", RANK)
        assert (report.steps, report.num_examples, report.num_loss_tokens, report.loss_sum) == (4, 8, 40, 20.0)
        assert (report.held_examples, report.held_loss_tokens) == (9, 45), "however few a round came to"
        assert report.update == peft_dir.digest(queue.jobs.update("r1"))
        assert queue.submit("r1") == report, "asking again changes nothing"
        assert queue.cotrainer.started == ["r1"]

    run(story)


def test_the_same_order_finds_the_round_and_its_progress(run: Run) -> None:
    async def story(queue: Queue) -> None:
        queue.cotrainer.hold = asyncio.Event()
        queue.submit("r1")
        await until(lambda: queue.jobs.report("r1").steps == 1)
        assert queue.submit("r1").state is JobState.RUNNING
        assert queue.submit("r1").num_loss_tokens == 5
        queue.cotrainer.hold.set()
        assert (await queue.ended("r1")).state is JobState.DONE
        assert queue.cotrainer.started == ["r1"]

    run(story)


OTHER = adapter(2)
REFUSALS: list[tuple[str, bytes, bytes, dict[str, Any], type[Exception], str]] = [
    ("base", PARENT, PARENT, {"base": "f" * 64}, BaseMismatch, "round new is for the base ffffffffffff"),
    ("not mixed", PARENT, PARENT, {"base": "f" * 64}, BaseMismatch, "run with mixed-bases=true"),
    ("kin", PARENT, PARENT, {"base": "f" * 64, "kin": "2" * 64}, BaseMismatch, "a base that was packed from it"),
    ("digest", PARENT, OTHER, {}, AdapterError, "the parent is not the adapter that was announced"),
    ("rank", PARENT, PARENT, {"plan": {"rank": 3}}, AdapterError, "has shape"),
    ("max rank", PARENT, PARENT, {"plan": {"rank": 5}}, AdapterError, "rank 5 is not within 1..4"),
    ("NaN", adapter(1, value=np.nan), adapter(1, value=np.nan), {}, AdapterError, "NaN"),
    ("bytes", b"junk", b"junk", {}, AdapterError, "not a safetensors file"),
    ("other parent", OTHER, OTHER, {"key": "known"}, Conflict, "known is already here with another parent or plan"),
    ("other plan", PARENT, PARENT, {"key": "known", "plan": {"steps": 5}}, Conflict, "another parent or plan"),
]


@pytest.mark.parametrize(
    ("announced", "sent", "changes", "error", "reason"), [c[1:] for c in REFUSALS], ids=[c[0] for c in REFUSALS]
)
def test_an_order_that_cannot_be_carried_out_is_refused_and_nothing_trains(
    run: Run, announced: bytes, sent: bytes, changes: dict[str, Any], error: type[Exception], reason: str
) -> None:
    async def story(queue: Queue) -> None:
        queue.submit("known")
        await queue.ended("known")
        with pytest.raises(error, match=reason):
            queue.jobs.submit(order(**{"key": "new", "parent": announced} | changes), sent)
        with pytest.raises(NotFound):
            queue.jobs.report("new")
        assert queue.journal.rounds("support").open() == []
        assert queue.cotrainer.started == ["known"]

    run(story)


def test_an_order_for_all_that_are_kin_is_carried_out_whatever_base_it_names(run: Run) -> None:
    async def story(queue: Queue) -> None:
        queue.submit("r1", base="f" * 64, kin=HELD_BASE.kin)
        assert (await queue.ended("r1")).state is JobState.DONE

    run(story)


def test_a_conflicting_order_leaves_the_parent_of_the_round_alone(run: Run, tmp_path: Path) -> None:
    async def story(queue: Queue) -> None:
        queue.submit("r1")
        with pytest.raises(Conflict):
            queue.submit("r1", OTHER)
        assert (tmp_path / "rounds" / "support" / "r1" / "parent.safetensors").read_bytes() == PARENT

    run(story)


def test_a_round_whose_engine_dies_is_begun_again(run: Run) -> None:
    async def story(queue: Queue) -> None:
        queue.cotrainer.hold = asyncio.Event()
        queue.submit("r1")
        await until(lambda: queue.cotrainer.started == ["r1"])
        await queue.restart_engine()
        queue.cotrainer.hold.set()
        assert (await queue.ended("r1")).state is JobState.DONE
        assert queue.cotrainer.started == ["r1", "r1"]

    run(story)


def test_a_round_that_a_killed_daemon_left_open_is_begun_again_by_the_next(run: Run) -> None:
    async def first(queue: Queue) -> None:
        queue.cotrainer.hold = asyncio.Event()
        queue.submit("r1")
        queue.submit("r2")
        await until(lambda: queue.cotrainer.started == ["r1"])

    async def second(queue: Queue) -> None:
        queue.cotrainer.forget()
        queue.cotrainer.hold = None
        for key in ("r1", "r2"):
            assert (await queue.ended(key)).state is JobState.DONE
        assert queue.cotrainer.started == ["r1", "r1", "r2"]

    run(first)
    run(second)


def test_a_round_of_which_the_engine_dies_each_time_is_given_up(run: Run) -> None:
    async def story(queue: Queue) -> None:
        queue.cotrainer.hold = asyncio.Event()
        queue.submit("r1")
        for attempt in range(1, MAX_ATTEMPTS + 1):
            await until(lambda attempt=attempt: len(queue.cotrainer.started) == attempt)  # type: ignore[misc]
            await queue.restart_engine()
        report = await queue.ended("r1")
        assert report.state is JobState.FAILED
        assert "given up" in report.error
        assert f"{MAX_ATTEMPTS} attempts" in report.error
        queue.cotrainer.hold.set()
        queue.submit("r2")
        assert (await queue.ended("r2")).state is JobState.DONE, "the next round is not held up"

    run(story)


def test_deaths_of_engines_that_users_may_have_caused_do_not_count_up_to_a_bound(run: Run) -> None:
    async def story(queue: Queue) -> None:
        queue.cotrainer.hold = asyncio.Event()
        queue.submit("r1")
        for attempt in range(1, MAX_EXCUSED + MAX_ATTEMPTS + 1):
            await until(lambda attempt=attempt: len(queue.cotrainer.started) == attempt)  # type: ignore[misc]
            assert not queue.jobs.report("r1").state.final
            await queue.restart_engine(under_a_user=True)
        report = await queue.ended("r1")
        assert report.state is JobState.FAILED
        assert f"given up after {MAX_EXCUSED + MAX_ATTEMPTS} attempts" in report.error

    run(story)


@pytest.mark.parametrize(
    ("attribute", "value", "reason"),
    [
        ("unavailable", "the co-trainer could not be built: no such weight", "could not be built: no such weight"),
        ("unavailable", "busy with job other", "busy with job other"),
        ("fails_with", "the loss is nan at step 3", "the loss is nan at step 3"),
        ("value", float("nan"), "what was trained is unusable: .* holds NaN"),
    ],
)
def test_a_round_that_cannot_be_trained_fails_with_the_reason(
    run: Run, attribute: str, value: object, reason: str
) -> None:
    async def story(queue: Queue) -> None:
        setattr(queue.cotrainer, attribute, value)
        queue.submit("r1")
        report = await queue.ended("r1")
        assert report.state is JobState.FAILED
        assert report.update is None
        with pytest.raises(TrainingError, match=f"round r1 is failed: .*{reason}"):
            queue.jobs.update("r1")
        assert queue.submit("r1") == report

    run(story)
