"""Jobs that take turns in an engine that dies go on in the next one to the same bits; an ended job leaves nothing."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.checkpoint import CheckpointHeader
from serving.cotrainer.lanes.device_lane import DeviceLane
from serving.cotrainer.lanes.lagging import LaggingDevice
from serving.trainer_socket import CancelJob, StatusQuery, TrainJob
from tests.toys.scheduler import Make, ToyScheduler
from tests.toys.serving.in_turns import STEPS, alone, came_to, end, particular, plain, quanta
from umbel.messages import JobState

pytestmark = pytest.mark.usefixtures("patience")


def kept(order: TrainJob, every_s: float = 1e-9, **changes: Any) -> TrainJob:
    """The same job with a checkpoint at each step, if no other one is being written."""
    changes = {"checkpoint": f"{order.output}-checkpoint", "checkpoint_s": every_s, **changes}
    return order.model_copy(update=changes)


def steps_of(order: TrainJob) -> int:
    path = Path(str(order.checkpoint))
    return CheckpointHeader.read(path).steps if path.exists() else 0


def wait(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(1e-3)


def settled(scheduler: ToyScheduler) -> None:
    wait(lambda: not scheduler.cotrainer.jobs._writer.busy)


def run(scheduler: ToyScheduler, count: int) -> None:
    """Run so many quanta; all that was to be written is on disk then."""
    for _ in quanta(scheduler):
        settled(scheduler)
        if len(scheduler.labels) >= count:
            break


@pytest.mark.parametrize("lagging", [False, True])
def test_jobs_in_turns_go_on_in_the_next_engine_to_the_same_bits(
    scheduler: ToyScheduler, make: Make, lagging: bool
) -> None:
    """Wherever the first one dies: between and within steps, swaps and checkpoints, before the first and after all."""
    orders = [kept(plain(scheduler)), kept(particular(scheduler))]
    wanted = [alone(scheduler, order) for order in orders]
    for order in orders:
        Path(f"{order.output}-checkpoint").unlink(missing_ok=True)
    engine, seen = scheduler, set()
    for life in (40, 55, 70, 12, 85, 101, 3):
        if lagging:
            engine.cotrainer.lane = DeviceLane(LaggingDevice(2.0))
        for order in orders:
            engine.tell(order)
        run(engine, life)
        seen.add(tuple(map(steps_of, orders)))
        engine.close()
        engine = make()
        engine.grants.per_iteration = 1
    for order in orders:
        engine.tell(order)
    assert [came_to(engine, order) for order in orders] == wanted
    assert len(seen) > 3, seen
    for order in orders:
        job = engine.cotrainer.jobs.find(order.id)
        assert job is not None
        assert job.progress.examples == STEPS * order.plan.batch_size, "each step is counted once"
        assert job.seconds > job.progress.before_s > 0


def test_bursts_with_other_jobs_between_come_to_the_same_bits(scheduler: ToyScheduler) -> None:
    order = kept(particular(scheduler), every_s=0.0)
    wanted = alone(scheduler, order)
    for until in (1, 3, None):
        burst = order.model_copy(update={"id": f"until {until}", "until": until})
        scheduler.tell(plain(scheduler, f"beside {until}"))
        scheduler.tell(burst)
        status = end(scheduler, burst.id)
        assert (status.state, status.steps) == (JobState.DONE, until or STEPS), status.error
        assert steps_of(order) == min(until or STEPS, 3), "on disk before the job is said to be done"
    assert Path(order.output).read_bytes() == wanted


def test_without_seconds_or_a_file_none_is_written(scheduler: ToyScheduler) -> None:
    for order in (kept(plain(scheduler, "a"), every_s=0.0), kept(plain(scheduler, "b"), checkpoint=None)):
        scheduler.tell(order)
        assert came_to(scheduler, order)
    assert not list(scheduler.run_dir.glob("*checkpoint*"))


@pytest.mark.parametrize("ends", ["cancelled", "done"])
def test_after_its_job_has_ended_no_checkpoint_appears(
    scheduler: ToyScheduler, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    order = kept(plain(scheduler, steps=2 if ends == "done" else STEPS))
    go, fsync = threading.Event(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: go.wait(20) and fsync(file))
    scheduler.tell(order)
    for _ in quanta(scheduler):
        if scheduler.cotrainer.jobs._writer.busy and ends == "cancelled":
            assert scheduler.tell(CancelJob(id=order.id)).state is JobState.CANCELLED
    assert scheduler.cotrainer.jobs._writer.busy
    job = scheduler.cotrainer.jobs.find(order.id)
    assert job is not None
    assert job._course is not None
    assert job._course._writing is not None
    writing = job._course._writing
    wait(lambda: writing._stopped)
    go.set()
    settled(scheduler)
    assert end(scheduler, order.id).state.value == ends
    assert not list(scheduler.run_dir.glob("*checkpoint*"))
    assert not list(scheduler.run_dir.glob(".*.tmp"))


def test_a_burst_whose_state_cannot_be_written_fails_with_the_reason(scheduler: ToyScheduler) -> None:
    order = kept(plain(scheduler), checkpoint="/nowhere/checkpoint", until=2)
    scheduler.tell(order)
    status = end(scheduler, order.id)
    assert status.state is JobState.FAILED
    assert "/nowhere" in status.error


def test_rows_are_read_from_the_file_that_the_job_names(scheduler: ToyScheduler) -> None:
    file = scheduler.run_dir / "rows.npy"
    bad = plain(scheduler, "bad").model_copy(update={"rows": str(file)})
    np.save(file, np.array([0, 99], np.int32))
    scheduler.tell(bad)
    assert "rows 0 to 99" in end(scheduler, "bad").error
    every, some = plain(scheduler, "all"), bad.model_copy(update={"id": "some"})
    np.save(file, np.array([0, 1], np.int32))
    scheduler.tell(some)
    assert came_to(scheduler, some) != alone(scheduler, every)
    assert scheduler.tell(StatusQuery(id="some")).examples == STEPS * some.plan.batch_size
