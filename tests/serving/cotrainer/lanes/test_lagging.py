"""A lagging device does its work in order, later than it was launched; the environment asks for one."""

import pytest
import torch

from serving.cotrainer.lanes import lagging, lane_on
from serving.cotrainer.lanes.device_lane import DeviceLane
from serving.cotrainer.lanes.lagging import LaggingDevice
from serving.cotrainer.lanes.lane import CpuLane
from umbel.errors import ConfigError

CPU = torch.device("cpu")


class Clock:
    now = 10.0

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds


def test_work_ends_later_by_the_factor_than_it_was_launched() -> None:
    clock = Clock()
    lane = DeviceLane(LaggingDevice(3.0, clock), clock)
    lane.run(lambda: clock.spend(0.5))
    assert (clock.now, lane.ready()) == (10.5, False)
    clock.now = 11.4
    assert not lane.ready(), "it began at 10.0 and takes 1.5 s"
    clock.now = 11.5
    assert lane.ready()
    (took,) = lane.ended()
    assert (took.device_s, took.launch_s) == (pytest.approx(1.5), 0.5)


def test_work_waits_for_what_was_launched_before() -> None:
    clock = Clock()
    device = LaggingDevice(2.0, clock)
    ends = []
    for _ in range(2):
        with device.on(None):
            clock.spend(1.0)
            event = device.event()
            event.record()
        ends.append(event)
    assert device.free_at == 14.0
    clock.now = 13.9
    assert [event.query() for event in ends] == [True, False]
    assert ends[0].elapsed_time(ends[1]) == 2000.0


@pytest.mark.parametrize("text", ["", "no", "0", "-1", "nan", "inf"])
def test_a_lag_that_is_no_number_above_0_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(lagging.VARIABLE, text)
    with pytest.raises(ConfigError, match=f"UMBEL_LAG = '{text}': expected a number above 0"):
        lane_on(CPU, {})


def test_a_cpu_lags_only_where_the_environment_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(lagging.VARIABLE, raising=False)
    assert isinstance(lane_on(CPU, {}), CpuLane)
    monkeypatch.setenv(lagging.VARIABLE, "1.5")
    assert isinstance(lane_on(CPU, {}), DeviceLane)
