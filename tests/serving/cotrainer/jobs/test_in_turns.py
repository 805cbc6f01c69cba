"""Jobs that take turns come to the same bits as alone; a verdict goes next; one that fails or goes costs no other."""

from collections.abc import Callable, Iterator
from itertools import groupby, islice, takewhile
from pathlib import Path
from typing import Any

import pytest
import torch

from serving.cotrainer.jobs import in_turns, turns
from serving.cotrainer.lanes.device_lane import DeviceLane
from serving.cotrainer.lanes.lagging import LaggingDevice
from serving.cotrainer.lora import LayerFactors, ParkedLayer
from serving.trainer_socket import CancelJob, CoTrainerStatus, QuantumStats, StatusQuery, TrainJob
from tests.toys.scheduler import Make, ToyScheduler
from tests.toys.serving.device import ToyDevice
from umbel.messages import JobState
from umbel.site import memory

pytestmark = pytest.mark.usefixtures("patience")

STEPS = 4
NONE = QuantumStats()


@pytest.fixture
def scheduler(make: Make, monkeypatch: pytest.MonkeyPatch) -> ToyScheduler:
    """A busy engine that runs one quantum per iteration, each of which is said to take a second: a turn is a step."""
    monkeypatch.setattr(turns, "SWAP_PART", 1e9)
    scheduler = make()
    scheduler.grants.per_iteration = 1
    return scheduler


def plain(scheduler: ToyScheduler, name: str = "plain", **changes: Any) -> TrainJob:
    order = scheduler.train_job(name)
    return order.model_copy(update={"plan": order.plan.model_copy(update={"steps": STEPS, "seed": 1, **changes})})


def particular(scheduler: ToyScheduler, name: str = "particular") -> TrainJob:
    """Return a job with state of every kind: one factor is trained, and pulled to its parent."""
    order = plain(scheduler, name, seed=2, factors="B", proximal=0.5, weight_decay=0.1)
    return order.model_copy(update={"share": 2.0})


def quanta(scheduler: ToyScheduler) -> Iterator[tuple[str, str]]:
    """Run a quantum per iteration until no job is left; yield the job that has the turn and the kind of the quantum."""
    scheduler.load(running=1)
    while (job := scheduler.cotrainer.runnable()) is not None:
        if (quantum := scheduler.cotrainer.jobs.next) is None:
            scheduler.busy()  # the device has not done the last one
            continue
        scheduler.busy()
        yield job.id, quantum.kind


def end(scheduler: ToyScheduler, job: str) -> CoTrainerStatus:
    """Run to the end of all jobs; return what one of them has come to."""
    for _ in quanta(scheduler):
        pass
    assert scheduler.cotrainer.jobs.open == {}
    while not (status := scheduler.tell(StatusQuery(id=job))).state.final:
        pass
    return status


def alone(scheduler: ToyScheduler, order: TrainJob) -> bytes:
    """Return the update of a job that has the trainer for itself."""
    order = order.model_copy(update={"id": f"{order.id}-alone", "output": f"{order.output}-alone"})
    scheduler.tell(order)
    assert end(scheduler, order.id).state is JobState.DONE
    return Path(order.output).read_bytes()


def came_to(scheduler: ToyScheduler, order: TrainJob) -> bytes:
    status = end(scheduler, order.id)
    assert (status.job, status.state, status.steps) == (order.id, JobState.DONE, STEPS), status.error
    return Path(order.output).read_bytes()


def test_two_jobs_in_turns_are_bit_equal_to_each_alone(scheduler: ToyScheduler) -> None:
    one, other, asked = plain(scheduler), particular(scheduler), scheduler.evaluate_job()
    wanted = alone(scheduler, one), alone(scheduler, other)
    scheduler.tell(asked.model_copy(update={"id": "alone"}))
    scores = end(scheduler, "alone").evaluation
    before = scheduler.tell(StatusQuery()).turns
    scheduler.tell(one)
    scheduler.tell(other)
    steps = 0
    for _, kind in quanta(scheduler):
        steps += kind == "step"
        if steps == 3 and kind == "optimizer" and "evaluate" not in scheduler.tell(StatusQuery()).open_jobs:
            scheduler.tell(asked)
    assert (came_to(scheduler, one), came_to(scheduler, other)) == wanted
    status = end(scheduler, asked.id)
    assert status.evaluation == scores is not None
    assert status.turns - before >= 2 * STEPS, "they really took turns"
    assert (status.open_jobs, status.parked_bytes) == ({}, 0)


def test_jobs_share_the_trainer_by_their_shares(scheduler: ToyScheduler) -> None:
    orders = [plain(scheduler, name, steps=50).model_copy(update={"share": share}) for name, share in SHARES.items()]
    for order in orders:
        scheduler.tell(order)
    for _ in islice(quanta(scheduler), 600):
        pass
    jobs = scheduler.cotrainer.jobs.open
    assert jobs.keys() == SHARES.keys()
    step = 1 + len(scheduler.trainer.layers) * (2 * 4 + 1) + 2  # two micro-batches, each with a quantum of the head
    first = 1 + len(scheduler.trainer.layers) + step
    for name, share in SHARES.items():
        for another, other in SHARES.items():
            assert abs(jobs[name] / share - jobs[another] / other) <= first / share + first / other


SHARES = {"a": 1.0, "b": 2.0, "c": 3.0}


@pytest.mark.parametrize("count", [1, 2])
def test_an_evaluation_takes_the_next_turn(scheduler: ToyScheduler, count: int) -> None:
    """It waits for the rest of a step; two of them have their turns one after the other, without training between."""
    order, asked = plain(scheduler), scheduler.evaluate_job()
    scheduler.tell(order)
    ran = quanta(scheduler)
    for _, kind in ran:
        if kind == "attention":
            break
    names = [f"evaluate-{number}" for number in range(count)]
    for name in names:
        scheduler.tell(asked.model_copy(update={"id": name}))
    seen = []
    for job, kind in ran:
        seen.append((job, kind))
        if job == order.id and kind == "step":
            break
    kinds = [kind for job, kind in seen if job == order.id]
    layers = len(scheduler.trainer.layers)
    assert kinds[kinds.index("optimizer") :] == ["optimizer"] * layers + ["swap"] * layers + ["step"]
    assert [job for job, _ in groupby(job for job, _ in seen)] == [order.id, *names, order.id]
    states = [scheduler.tell(StatusQuery(id=name)).state for name in names]
    assert states == [JobState.DONE] * count


def test_an_evaluation_that_comes_in_the_middle_of_a_swap_is_the_next_and_harms_neither(
    scheduler: ToyScheduler,
) -> None:
    one, other, asked = plain(scheduler), particular(scheduler), scheduler.evaluate_job()
    wanted = alone(scheduler, one), alone(scheduler, other)
    scheduler.tell(one)
    scheduler.tell(other)
    swaps = 2 * len(scheduler.trainer.layers) + 1
    assert len([*islice((kind for _, kind in quanta(scheduler) if kind == "swap"), swaps)]) == swaps
    scheduler.tell(asked)
    kinds = [kind for _, kind in takewhile(lambda ran: ran[0] == asked.id or ran[1] == "swap", quanta(scheduler))]
    assert [kind for kind in kinds if kind != "swap"][-1] == "read_back", "nothing is trained before it has ended"
    assert (came_to(scheduler, one), came_to(scheduler, other)) == wanted


def test_of_a_job_that_has_not_begun_nothing_is_parked(scheduler: ToyScheduler) -> None:
    one, other, asked = plain(scheduler), particular(scheduler), scheduler.evaluate_job()
    scheduler.tell(one)
    scheduler.tell(other)
    layers = len(scheduler.trainer.layers)
    assert len([*islice((kind for _, kind in quanta(scheduler) if kind == "swap"), layers)]) == layers
    parked = scheduler.tell(asked).parked_bytes
    for job, kind in quanta(scheduler):
        assert kind != "swap" or job != asked.id
        if job == asked.id:
            assert scheduler.tell(StatusQuery()).parked_bytes == parked
    assert came_to(scheduler, other)


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


def test_what_waits_takes_what_the_arithmetic_says(scheduler: ToyScheduler) -> None:
    one, other = particular(scheduler, "one"), particular(scheduler, "other")
    elements = sum(factors.elements for factors in scheduler.trainer.factors)
    trained = sum(b.numel() for factors in scheduler.trainer.factors for _, b in factors.pairs.values())
    scheduler.tell(one)
    scheduler.tell(other)
    most = max(scheduler.tell(StatusQuery()).parked_bytes for _ in quanta(scheduler))
    moments = 2 * 4 * trained + 4 * len(scheduler.trainer.factors)  # and AdamW's count of steps, one per buffer
    assert most == 2 * 4 * elements + moments, "factors and parent, and moments of what is trained; no gradients"
    room = scheduler.trainer.factors[0].room_to_park()
    assert sum(tensor.nbytes for tensor in room) == memory.PARKED * 4 * scheduler.trainer.factors[0].elements


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


def test_the_time_of_a_round_runs_while_it_waits_for_its_first_turn(scheduler: ToyScheduler) -> None:
    scheduler.tell(plain(scheduler))
    late = plain(scheduler, "late", seconds=1e-9)
    scheduler.tell(late)
    status = end(scheduler, "late")
    assert (status.state, status.steps) == (JobState.DONE, 0)


Lane = Callable[[], tuple[DeviceLane, Callable[[], None]]]


def lagging() -> tuple[DeviceLane, Callable[[], None]]:
    return DeviceLane(LaggingDevice(2.0)), lambda: None


def told() -> tuple[DeviceLane, Callable[[], None]]:
    device = ToyDevice()
    return DeviceLane(device, clock=lambda: 0.0), device.finish


@pytest.mark.parametrize("lane", [lagging, told])
def test_on_a_device_that_lags_each_quantum_is_booked_on_its_own_job(scheduler: ToyScheduler, lane: Lane) -> None:
    one, other, asked = plain(scheduler), particular(scheduler), scheduler.evaluate_job()
    wanted = alone(scheduler, one), alone(scheduler, other)
    scheduler.cotrainer.lane, finish = lane()
    trained = {order.id: 0 for order in (one, other, asked)}
    before = scheduler.tell(StatusQuery()).quanta
    for order in (one, other, asked):
        scheduler.tell(order)
    scheduler.load(running=1)
    while (job := scheduler.cotrainer.runnable()) is not None:
        trained[job.id] += len(scheduler.busy())
        finish()
    assert (came_to(scheduler, one), came_to(scheduler, other)) == wanted
    assert end(scheduler, asked.id).state is JobState.DONE
    if lane is told:  # each quantum takes a second, and "open" has no label
        found = {order.id: scheduler.cotrainer.jobs.find(order.id) for order in (one, other, asked)}
        assert {name: job.busy_s for name, job in found.items() if job} == {n: k + 1 for n, k in trained.items()}
        after = scheduler.tell(StatusQuery()).quanta
        counted = sum(stats.count - before.get(kind, NONE).count for kind, stats in after.items() if kind != "swap")
        assert counted == sum(trained.values()) + len(trained)
