"""A job that fails or is cancelled while jobs take turns costs no other; jobs are known by their ids, and bounded."""

from itertools import islice

import pytest
import torch

from serving.cotrainer.jobs import in_turns
from serving.cotrainer.lora import LayerFactors, ParkedLayer
from serving.trainer_socket import CancelJob, StatusQuery
from tests.toys.scheduler import ToyScheduler
from tests.toys.serving.in_turns import alone, came_to, end, particular, plain, quanta
from umbel.messages import JobState

pytestmark = pytest.mark.usefixtures("patience")


@pytest.mark.parametrize("gone", ["the one that leaves", "the one that comes"])
def test_a_job_that_is_cancelled_in_the_middle_of_a_swap_leaves_the_other_whole(
    scheduler: ToyScheduler, gone: str
) -> None:
    one, other = plain(scheduler), particular(scheduler)
    wanted = {order.id: alone(scheduler, order) for order in (one, other)}
    scheduler.tell(one)
    scheduler.tell(other)
    swaps = 2 * len(scheduler.trainer.layers) + 1  # both have been parked once
    *_, coming = islice((job for job, kind in quanta(scheduler) if kind == "swap"), swaps)
    comes, leaves = (one, other) if coming == one.id else (other, one)
    victim, stays = (leaves, comes) if gone == "the one that leaves" else (comes, leaves)
    assert scheduler.tell(CancelJob(id=victim.id)).state is JobState.CANCELLED
    assert came_to(scheduler, stays) == wanted[stays.id]
    assert scheduler.tell(StatusQuery(id=victim.id)).state is JobState.CANCELLED
    assert scheduler.tell(StatusQuery()).parked_bytes == 0


@pytest.mark.parametrize("kind", ["optimizer", "mlp_backward", "step", "load"])
def test_a_job_that_is_cancelled_in_the_middle_of_a_step_leaves_no_trace(scheduler: ToyScheduler, kind: str) -> None:
    """Its gradients, its factors and what it trained of them are in the buffers to which the other one comes back."""
    one, other = plain(scheduler), particular(scheduler)
    wanted = alone(scheduler, one)
    scheduler.tell(one)
    scheduler.tell(other)
    for job, ran in quanta(scheduler):
        if (job, ran) == (other.id, kind):
            break
    assert scheduler.tell(CancelJob(id=other.id)).state is JobState.CANCELLED
    assert came_to(scheduler, one) == wanted


def test_a_job_for_which_there_is_no_room_while_it_waits_fails_and_no_other_does(
    scheduler: ToyScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = plain(scheduler), particular(scheduler)
    wanted = alone(scheduler, other)
    park = LayerFactors.park
    last = scheduler.trainer.factors[-1]

    def scarce(factors: LayerFactors) -> ParkedLayer:
        if factors is last:
            torch.empty(1 << 60, dtype=torch.uint8)
        return park(factors)

    scheduler.tell(one)
    with monkeypatch.context() as patch:
        patch.setattr(LayerFactors, "park", scarce)
        scheduler.tell(other)
        for _ in quanta(scheduler):
            if one.id not in scheduler.cotrainer.jobs.open:
                break
    failed = scheduler.tell(StatusQuery(id=one.id))
    assert failed.state is JobState.FAILED
    assert "no room for what this one has learnt" in failed.error
    assert "[training].memory_mb" in failed.error
    assert came_to(scheduler, other) == wanted


def test_a_bug_in_a_quantum_costs_the_job_that_has_the_turn(scheduler: ToyScheduler) -> None:
    one, other = plain(scheduler), particular(scheduler)
    wanted = alone(scheduler, other)
    scheduler.tell(one)
    scheduler.tell(other)
    failing = True

    def fail(count: int) -> None:
        job = scheduler.cotrainer.job
        if failing and job is not None and job.id == one.id and job.progress.steps == 2:
            raise KeyError("a bug")

    scheduler.on_quantum = fail
    assert end(scheduler, one.id).state is JobState.FAILED
    failing = False
    assert came_to(scheduler, other) == wanted


def test_a_job_is_asked_for_by_its_id(scheduler: ToyScheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_turns, "KEPT", 2)
    orders = [plain(scheduler, name, steps=1) for name in ("first", "second", "third", "fourth")]
    assert scheduler.tell(StatusQuery(id="first")).job is None
    scheduler.tell(orders[0])
    scheduler.tell(orders[1])
    status = scheduler.tell(StatusQuery(id="second"))
    assert (status.job, status.state, status.steps) == ("second", JobState.RUNNING, 0)
    assert scheduler.tell(StatusQuery()).job == "first"
    assert status.open_jobs == {"first": 0.0, "second": 0.0}
    for order in orders:
        scheduler.tell(order)
        assert end(scheduler, order.id).steps == 1
    known = {order.id: scheduler.tell(StatusQuery(id=order.id)).job for order in orders}
    assert known == {"first": None, "second": "second", "third": "third", "fourth": "fourth"}
    assert scheduler.tell(orders[3]).state is JobState.DONE, "it is not begun again"


def test_too_many_open_jobs_are_refused(scheduler: ToyScheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_turns, "MOST_OPEN", 2)
    orders = [plain(scheduler, name, steps=1) for name in "abc"]
    for order in orders[:2]:
        assert scheduler.tell(order).error == ""
    refused = scheduler.tell(orders[2])
    assert (refused.job, refused.error) == (
        None, "2 jobs are open here already; wait until one has ended, or cancel one"
    )  # fmt: skip
    assert scheduler.tell(orders[1]).error == "", "it is there already"
    scheduler.tell(CancelJob(id="a"))
    assert scheduler.tell(orders[2]).job == "c"
