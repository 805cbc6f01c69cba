"""`LaggingDevice`: a device on a CPU whose work ends later than it was launched, so that a host that runs ahead of its
device can be tested, and fails, without a GPU.

    UMBEL_LAG=1.5 umbel serve site.toml      each quantum ends 1.5 times its own CPU time after its launch

The host computes a quantum at once, as any CPU does, and the result is there; what lags is the time at which the
device says so. Work is done in order: each piece begins when it is launched, or when the one before it ends.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from umbel.errors import ConfigError

VARIABLE = "UMBEL_LAG"


def lag() -> float | None:
    """Return the factor that the environment asks for; None without one. Raises ConfigError for another text."""
    text = os.environ.get(VARIABLE)
    if text is None:
        return None
    try:
        factor = float(text)
    except ValueError:
        factor = -1.0
    if not 0 < factor < 1000:
        raise ConfigError(f"{VARIABLE} = {text!r}: expected a number above 0, the device's time per CPU time of work")
    return factor


class LaggingDevice:
    """A device that takes `factor` times as long for its work as the CPU did to launch it."""

    def __init__(self, factor: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self.factor, self.clock = factor, clock
        self.free_at = 0.0
        """Time at which the device has done all that was launched."""
        self.launched_at = 0.0
        """Time up to which launched work is in `free_at`."""

    def stream(self) -> None:
        return None

    def event(self) -> "LaggingEvent":
        return LaggingEvent(self)

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        self.launched_at = self.clock()
        yield

    def launched(self) -> float:
        """Add what was launched since the last call, or since `on`; return the time at which all of it is done."""
        now = self.clock()
        self.free_at = max(self.free_at, self.launched_at) + (now - self.launched_at) * self.factor
        self.launched_at = now
        return self.free_at


class LaggingEvent:
    """Has happened once the device has done all that was launched before it was recorded."""

    def __init__(self, device: LaggingDevice) -> None:
        self._device = device
        self._at = 0.0

    def record(self, stream: Any = None) -> None:
        self._at = self._device.launched()

    def query(self) -> bool:
        return self._device.clock() >= self._at

    def elapsed_time(self, end_event: "LaggingEvent") -> float:
        return (end_event._at - self._at) * 1000
