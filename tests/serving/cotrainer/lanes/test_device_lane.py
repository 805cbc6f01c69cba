"""A lane on a device keeps one quantum outstanding, and the host never waits for it; the device is a toy."""

import pytest

from serving.cotrainer.lanes.device_lane import DeviceLane
from serving.cotrainer.lanes.lane import CpuLane
from tests.toys.serving.device import ToyDevice


class Clock:
    """Moves by `tick` seconds with every look, and by the whole length of every sleep."""

    def __init__(self, tick: float = 0.0) -> None:
        self.now, self.tick = 0.0, tick
        self.slept: list[float] = []

    def __call__(self) -> float:
        self.now += self.tick
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def device() -> ToyDevice:
    return ToyDevice()


@pytest.fixture
def lane(device: ToyDevice) -> DeviceLane:
    return DeviceLane(device, Clock())


def test_at_most_one_is_outstanding(lane: DeviceLane, device: ToyDevice) -> None:
    assert lane.ready()
    assert lane.run(lambda: device.work(3)) == "launched 3"
    assert not lane.ready()
    with pytest.raises(AssertionError, match="one quantum at a time"):
        lane.run(lambda: device.work(1))
    assert lane.ended() == []
    device.finish()
    assert lane.ready()


def test_the_time_of_a_quantum_is_the_devices_from_its_first_to_its_last_operation(
    lane: DeviceLane, device: ToyDevice
) -> None:
    lane.run(lambda: device.work(1))
    device.finish()
    lane.run(lambda: device.work(5))
    assert [took.seconds for took in lane.ended()] == [2.0]
    device.finish()
    assert [took.seconds for took in lane.ended()] == [6.0]
    assert lane.ended() == []


def test_the_hosts_time_for_the_launch_is_measured_and_counted(device: ToyDevice) -> None:
    clock = Clock()
    lane = DeviceLane(device, clock)

    def launch() -> None:
        clock.now += 0.25

    lane.run(launch)
    device.finish()
    (took,) = lane.ended()
    assert (took.device_s, took.launch_s, took.seconds) == (1.0, 0.25, 1.25)


def test_waiting_sleeps_and_ends_with_the_quantum_or_the_time(device: ToyDevice) -> None:
    clock = Clock()
    lane = DeviceLane(device, clock, clock.sleep)
    lane.wait(1.0)
    assert clock.slept == [], "nothing is outstanding"
    lane.run(lambda: device.work(1))
    lane.wait(0.01)
    assert sum(clock.slept) == pytest.approx(0.01)
    device.finish()
    lane.wait(0.01)
    assert sum(clock.slept) == pytest.approx(0.01)


def test_events_are_used_again(lane: DeviceLane, device: ToyDevice) -> None:
    for _ in range(50):
        lane.run(lambda: device.work(1))
        device.finish()
    assert len(lane.ended()) == 50
    assert device.events == 2


def test_a_quantum_that_raises_does_not_count(device: ToyDevice) -> None:
    def fail() -> None:
        raise ValueError("no")

    for lane in (CpuLane(), DeviceLane(device)):
        with pytest.raises(ValueError, match="no"):
            lane.run(fail)
        device.finish()
        assert lane.ready()
        assert lane.ended() == []
