"""On a device that runs behind its host, jobs end, nothing is launched behind what is outstanding, and each quantum is
counted where it ran; the device is a toy that has done what the test says, or one that lags by the clock.
"""

from types import SimpleNamespace
from typing import Any

import pytest

from serving.cotrainer import cotrainer
from serving.cotrainer.lanes.device_lane import DeviceLane
from serving.cotrainer.lanes.lagging import LaggingDevice
from serving.cotrainer.predictor import Batch
from serving.cotrainer.quantum import Quantum
from serving.trainer_socket import CancelJob
from tests.toys.scheduler import Make, ToyScheduler
from tests.toys.serving.device import ToyDevice
from umbel.messages import JobState

QUANTUM_S = 1.0
"""Time of a quantum on the toy device: from the event before its work to the one after it."""


pytestmark = pytest.mark.usefixtures("patience")


@pytest.fixture
def device() -> ToyDevice:
    return ToyDevice()


@pytest.fixture
def scheduler(make: Make, device: ToyDevice) -> ToyScheduler:
    """A busy engine with a job whose files are open, on a device whose host's launches take no time."""
    scheduler = make()
    scheduler.cotrainer.lane = DeviceLane(device, clock=lambda: 0.0)
    scheduler.tell(scheduler.train_job())
    scheduler.load(running=2)
    scheduler.open_files()
    device.finish()
    scheduler.grants.per_iteration = 0
    scheduler.busy()
    scheduler.grants.per_iteration = 4
    return scheduler


def decode(scheduler: ToyScheduler) -> Any:
    return SimpleNamespace(
        forward_mode=SimpleNamespace(is_extend=lambda: False), reqs=scheduler.scheduler.running_batch.reqs
    )


@pytest.mark.parametrize("kind", ["train", "evaluate"])
@pytest.mark.parametrize("factor", [0.1, 3.0])
def test_a_job_on_a_device_slower_than_its_host_ends_on_an_idle_engine(make: Make, kind: str, factor: float) -> None:
    scheduler = make()
    device = LaggingDevice(factor)
    scheduler.cotrainer.lane = DeviceLane(device)
    scheduler.tell(scheduler.train_job() if kind == "train" else scheduler.evaluate_job())
    status = scheduler.finish()
    assert status.state is JobState.DONE, status.error
    counted = {kind: scheduler.labels.count(kind) for kind in scheduler.labels}
    assert {kind: stats.count for kind, stats in status.quanta.items()} == {"open": 1, **counted}, "each was counted"
    assert all(stats.launch_s > 0 for stats in status.quanta.values())


def test_an_idle_engine_waits_for_the_device_and_looks_for_requests_meanwhile(
    scheduler: ToyScheduler, device: ToyDevice
) -> None:
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            scheduler.arrive()

    scheduler.load()
    scheduler.cotrainer.lane.wait = wait  # type: ignore[method-assign]
    assert len(scheduler.idle()) == 1, "the device never ends it"
    assert waits == [cotrainer.LOOK_S] * 3
    assert scheduler.sleeps == 0, "the scheduler takes the request at once"


@pytest.mark.parametrize("waits", ["in the queue", "on the socket"])
def test_a_request_that_waits_meets_one_quantum_whether_it_runs_or_is_launched(
    scheduler: ToyScheduler, device: ToyDevice, waits: str
) -> None:
    assert len(scheduler.busy()) == 1, "nothing is launched behind it, whatever the budget"
    scheduler.load(running=2, waiting=1 if waits == "in the queue" else 0)
    if waits == "on the socket":
        scheduler.arrive()
    for _ in range(3):
        assert scheduler.busy() == [], "it is outstanding"
    for _ in range(20):
        device.finish()
        assert len(scheduler.busy()) == 1
        assert scheduler.busy() == []
    assert scheduler.cotrainer.counts.most_while_waiting == 1


def test_a_quantum_that_ends_while_the_hook_looks_is_still_the_one_that_the_request_met(
    scheduler: ToyScheduler, device: ToyDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(scheduler.busy()) == 1
    scheduler.load(running=2, waiting=1)

    def finishing(quantum: Quantum) -> float:
        device.finish()
        return 1.0

    monkeypatch.setattr(scheduler.cotrainer.predictor, "quantum_high", finishing)
    assert [len(scheduler.busy()) for _ in range(4)] == [0, 1, 1, 1]
    assert scheduler.cotrainer.counts.most_while_waiting == 1


def test_what_is_outstanding_is_counted_when_it_has_ended_and_the_gate_is_closed(
    scheduler: ToyScheduler, device: ToyDevice
) -> None:
    trained = scheduler.cotrainer.observer.trained
    assert len(scheduler.busy()) == 1
    scheduler.grants.per_iteration = 0
    scheduler.busy()
    assert scheduler.cotrainer.observer.trained == trained, "it still runs"
    device.finish()
    scheduler.busy()
    assert scheduler.cotrainer.observer.trained == trained + QUANTUM_S


def test_an_iteration_beside_an_outstanding_quantum_is_not_taken_for_the_engines_own(
    scheduler: ToyScheduler, device: ToyDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone: list[int] = []
    beside: list[tuple[int, float, bool]] = []

    def observe(batch: Batch, seconds: float) -> None:
        alone.append(turn)

    def observe_beside(batch: Batch, seconds: float, trained: float, settled: bool) -> None:
        beside.append((turn, trained, settled))

    monkeypatch.setattr(scheduler.cotrainer.predictor, "observe", observe)
    monkeypatch.setattr(scheduler.cotrainer.predictor, "observe_beside", observe_beside)
    for turn in range(8):
        scheduler.grants.per_iteration = 4 if turn == 2 else 0
        if turn == 5:
            device.finish()
        scheduler.busy()
        scheduler.cotrainer.observer.starts(decode(scheduler))
        scheduler.cotrainer.observer.processed(cotrainer.clock())
    assert alone == [1, 2, 6, 7]
    assert beside == [(3, 0.0, False), (4, 0.0, False), (5, QUANTUM_S, True)]


def test_a_job_that_was_cancelled_gets_the_time_of_its_last_quantum(scheduler: ToyScheduler, device: ToyDevice) -> None:
    job = scheduler.cotrainer.job
    assert job is not None
    assert len(scheduler.busy()) == 1
    before = job.progress.busy_s
    assert scheduler.tell(CancelJob(id="job")).state is JobState.CANCELLED
    scheduler.tell(scheduler.train_job("next"))
    assert scheduler.busy() == [], "what is outstanding has the lane, whoever's it is"
    device.finish()
    scheduler.busy()
    assert job.progress.busy_s == before + QUANTUM_S
