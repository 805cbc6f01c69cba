"""Jobs that take turns on a toy scheduler, a quantum per iteration, and the same jobs alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from serving.trainer_socket import CoTrainerStatus, StatusQuery, TrainJob
from tests.toys.scheduler import ToyScheduler
from umbel.messages import JobState

STEPS = 4


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
