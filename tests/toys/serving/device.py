"""`ToyDevice`: a device that has done exactly what a test says."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any


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


class ToyDevice:
    """Numbers whatever is launched, each a second of work, and has `reached` what it was told to."""

    def __init__(self) -> None:
        self.launched = self.reached = self.events = 0

    def stream(self) -> str:
        return "training"

    def event(self) -> ToyEvent:
        self.events += 1
        return ToyEvent(self)

    def on(self, stream: Any) -> AbstractContextManager[None]:
        assert stream == "training"
        return nullcontext()

    def work(self, launches: int) -> str:
        self.launched += launches
        return f"launched {launches}"

    def finish(self) -> None:
        self.reached = self.launched
