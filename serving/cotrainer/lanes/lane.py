"""`Lane`, `CpuLane`: where quanta run. One quantum is outstanding at a time, on every device."""

import time
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar

T = TypeVar("T")


class Took(NamedTuple):
    """The time of a quantum, in seconds."""

    device_s: float
    """From its first to its last operation on the device."""
    launch_s: float = 0.0
    """Time in which the host launched it, if the device is another one: the scheduler's thread did nothing else."""

    @property
    def seconds(self) -> float:
        """Return the longest by which the quantum may have delayed the engine: its launch and then its work."""
        return self.device_s + self.launch_s


class Lane(Protocol):
    """A place in which quanta run one after the other.

    With one outstanding at a time, a request that comes meets at most one, and every result of a quantum is there when
    the next one is launched: nothing in a quantum has to wait for the device.
    """

    def run(self, work: Callable[[], T]) -> T:
        """Do the work of one quantum, or launch it; return its result. Call it only when `ready`."""

    def ready(self) -> bool:
        """Return whether nothing is outstanding, so that a quantum may be launched."""

    def wait(self, seconds: float) -> None:
        """Return when nothing is outstanding, or after `seconds`; the thread sleeps meanwhile."""

    def ended(self) -> list[Took]:
        """Return the times of the quanta that have ended since the last call, in the order in which they ran.

        A quantum that raised is left out.
        """


class CpuLane:
    """Runs each quantum at once, on the calling thread."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._ended: list[Took] = []

    def run(self, work: Callable[[], T]) -> T:
        began = self._clock()
        result = work()
        self._ended.append(Took(self._clock() - began))
        return result

    def ready(self) -> bool:
        return True

    def wait(self, seconds: float) -> None:
        pass

    def ended(self) -> list[Took]:
        ended, self._ended = self._ended, []
        return ended
