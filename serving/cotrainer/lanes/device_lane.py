"""`DeviceLane`: launches quanta on a device that works while the host goes on, and never waits for it.

The host queries an event; it does not synchronise. So neither the engine's stream nor the scheduler's thread stands
still for training. The device does nothing for training between the end of a quantum and the next look of the host:
the rest of an iteration while the engine is busy, `POLL_S` at most while it is idle.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

from serving.cotrainer.lanes.lane import Took

T = TypeVar("T")

POLL_S = 1e-4
"""Sleep between two queries of an event while the engine is idle."""


class Event(Protocol):
    """The methods of `torch.cuda.Event` that are used."""

    def record(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        """Return whether the device has come as far as the last `record`."""

    def elapsed_time(self, end_event: Any) -> float:
        """Return the milliseconds from this event to `end_event`."""


class Device(Protocol):
    """The calls of a device that a lane needs: `lanes.cuda.Cuda`, or `lanes.lagging.LaggingDevice` on a CPU."""

    def stream(self) -> Any:
        """Make the stream on which all quanta run, one after the other."""

    def event(self) -> Event:
        """Make an event that takes the time."""

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Return a context in which work is launched on that stream."""


class DeviceLane:
    """Launches quanta in order on a stream of their own, one at a time."""

    def __init__(
        self,
        device: Device,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._device, self._clock, self._sleep = device, clock, sleep
        self._stream = device.stream()
        self._first, self._last = device.event(), device.event()
        self._launch_s: float | None = None
        """Host time of the outstanding quantum's launch; None while nothing is outstanding."""
        self._ended: list[Took] = []

    def run(self, work: Callable[[], T]) -> T:
        assert self.ready(), "a lane takes one quantum at a time; ask `ready` first"
        began = self._clock()
        with self._device.on(self._stream):
            self._first.record(self._stream)
            result = work()
            self._last.record(self._stream)
        self._launch_s = self._clock() - began
        return result

    def ready(self) -> bool:
        if self._launch_s is not None and self._last.query():
            self._ended.append(Took(self._first.elapsed_time(self._last) / 1000, self._launch_s))
            self._launch_s = None
        return self._launch_s is None

    def wait(self, seconds: float) -> None:
        until = self._clock() + seconds
        while not self.ready() and (left := until - self._clock()) > 0:
            self._sleep(min(POLL_S, left))

    def ended(self) -> list[Took]:
        self.ready()
        ended, self._ended = self._ended, []
        return ended
