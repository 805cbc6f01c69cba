"""Jobs that take turns come to the same bits as alone, and get their shares; a verdict goes next."""

from collections.abc import Callable
from itertools import groupby, islice, takewhile

import pytest

from serving.cotrainer.lanes.device_lane import DeviceLane
from serving.cotrainer.lanes.lagging import LaggingDevice
from serving.trainer_socket import QuantumStats, StatusQuery
from tests.toys.scheduler import ToyScheduler
from tests.toys.serving.device import ToyDevice
from tests.toys.serving.in_turns import STEPS, alone, came_to, end, particular, plain, quanta
from umbel.messages import JobState
from umbel.site import memory

pytestmark = pytest.mark.usefixtures("patience")

NONE = QuantumStats()


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_two_jobs_in_turns_are_bit_equal_to_each_alone(scheduler: ToyScheduler, objective: str) -> None:
    one, other, asked = plain(scheduler, objective=objective), particular(scheduler), scheduler.evaluate_job()
    wanted = alone(scheduler, one), alone(scheduler, other)
    scheduler.tell(asked.model_copy(update={"id": "alone"}))
    scores = end(scheduler, "alone").evaluation
    before = scheduler.tell(StatusQuery()).turns
    scheduler.tell(one)
    scheduler.tell(other)
    steps, waits = 0, True
    for _, kind in quanta(scheduler):
        steps += kind == "step"
        if waits and steps >= 3 and kind == "optimizer":
            scheduler.tell(asked)
            waits = False
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
        assert {name: job.progress.busy_s for name, job in found.items() if job} == {
            n: k + 1 for n, k in trained.items()
        }
        after = scheduler.tell(StatusQuery()).quanta
        counted = sum(stats.count - before.get(kind, NONE).count for kind, stats in after.items() if kind != "swap")
        assert counted == sum(trained.values()) + len(trained)
