"""A CUDA lane keeps at most two quanta outstanding, in order, and the host never waits; events and streams are toys."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch

from serving.cotrainer.lane import OUTSTANDING, CpuLane, CudaLane, Readback


class ToyEvent:
    """Has happened once the toy device has come so far. It has no `synchronize`: whoever calls that, fails."""

    def __init__(self, device: "ToyDevice") -> None:
        self._device = device
        self._at = 0

    def record(self, stream: Any = None) -> None:
        self._device.launched += 1
        self._at = self._device.launched

    def query(self) -> bool:
        return self._at <= self._device.reached

    def elapsed_time(self, end_event: "ToyEvent") -> float:
        assert self.query(), "the time of an event that has not happened"
        assert end_event.query(), "the time of an event that has not happened"
        return 1000.0 * (end_event._at - self._at)


class ToyStream:
    def __init__(self, sms: int | None) -> None:
        self.sms = sms
        self.waits_for: list[ToyEvent] = []

    def wait_event(self, event: ToyEvent) -> None:
        self.waits_for.append(event)


class ToyDevice:
    """Numbers whatever is launched, and has `reached` what it was told to."""

    def __init__(self) -> None:
        self.launched = self.reached = self.events = 0
        self.streams: list[ToyStream] = []
        self.used: list[int | None] = []

    def stream(self, sms: int | None) -> ToyStream:
        self.streams.append(ToyStream(sms))
        return self.streams[-1]

    def event(self) -> ToyEvent:
        self.events += 1
        return ToyEvent(self)

    def on(self, stream: ToyStream) -> AbstractContextManager[None]:
        self.used.append(stream.sms)
        return nullcontext()

    def work(self, launches: int) -> str:
        self.launched += launches
        return f"launched {launches}"

    def finish(self) -> None:
        self.reached = self.launched


@pytest.fixture
def device() -> ToyDevice:
    return ToyDevice()


@pytest.fixture
def lane(device: ToyDevice) -> CudaLane:
    return CudaLane(None, device)  # type: ignore[arg-type]


def test_at_most_two_are_outstanding(lane: CudaLane, device: ToyDevice) -> None:
    for _ in range(OUTSTANDING):
        assert lane.ready()
        assert lane.run(lambda: device.work(3)) == "launched 3"
    assert not lane.ready()
    with pytest.raises(AssertionError, match="third"):
        lane.run(lambda: device.work(1))
    assert lane.elapsed() == []
    device.finish()
    assert lane.ready()


def test_quanta_end_in_the_order_in_which_they_ran(lane: CudaLane, device: ToyDevice) -> None:
    lane.run(lambda: device.work(1))
    device.finish()
    lane.run(lambda: device.work(5))
    assert lane.elapsed() == [2.0]
    device.finish()
    lane.run(lambda: device.work(2))
    device.finish()
    assert lane.elapsed() == [6.0, 3.0]
    assert lane.elapsed() == []


def test_events_are_used_again(lane: CudaLane, device: ToyDevice) -> None:
    for _ in range(50):
        assert lane.ready()
        lane.run(lambda: device.work(1))
        device.finish()
    assert len(lane.elapsed()) == 50
    assert device.events <= 2 * OUTSTANDING


def test_partitions_are_chosen_per_quantum_and_keep_the_order(lane: CudaLane, device: ToyDevice) -> None:
    for sms in (None, 16, 16, None):
        lane.sms = sms
        lane.run(lambda: device.work(1))
        if sms == 16:
            device.finish()
    assert device.used == [None, 16, 16, None]
    whole, partition = device.streams
    assert len(partition.waits_for) == 1, "for the quantum before it, in the other partition"
    assert whole.waits_for == [], "nothing was running any more"


def test_a_quantum_that_raises_does_not_count(device: ToyDevice) -> None:
    def fail() -> None:
        raise ValueError("no")

    for lane in (CpuLane(), CudaLane(None, device)):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="no"):
            lane.run(fail)
        device.finish()
        assert lane.ready()
        assert lane.elapsed() == []


def test_on_a_cpu_quanta_run_at_once() -> None:
    ticks = iter([1.0, 3.5, 4.0, 4.25])
    lane = CpuLane(clock=lambda: next(ticks))
    assert [lane.run(lambda: "a"), lane.run(lambda: "b")] == ["a", "b"]
    assert lane.ready()
    assert lane.elapsed() == [2.5, 0.25]
    assert lane.elapsed() == []


def test_a_readback_on_a_cpu_is_the_tensor_itself() -> None:
    values = torch.ones(3, requires_grad=True)
    read = Readback(values).read()
    assert read.data_ptr() == values.data_ptr()
    assert not read.requires_grad
