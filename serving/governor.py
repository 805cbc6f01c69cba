"""How many quanta may run now. Pure: time comes in as an argument."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Load:
    """What the engine has to do, at one scheduler iteration."""

    running: int
    """Requests that are being decoded."""
    waiting: int
    """Requests that have not begun."""


class FixedGovernor:
    """A set number of quanta per busy iteration, and at most `share_cap` of the time.

    After a quantum of t seconds none follows for t · (1/share_cap - 1) seconds, so the share holds over any window
    longer than a quantum, busy or idle.
    """

    def __init__(self, quanta_per_iteration: int, share_cap: float) -> None:
        self.quanta_per_iteration = quanta_per_iteration
        self._rest = 1 / share_cap - 1
        self._ready_at = 0.0

    def quanta(self, load: Load, now: float) -> int:
        """How many quanta may run before the next iteration of a busy engine."""
        if now < self._ready_at:
            return 0
        return min(1, self.quanta_per_iteration) if load.waiting else self.quanta_per_iteration

    def wait(self, now: float) -> float:
        """Seconds until an idle engine may run its next quantum."""
        return max(0.0, self._ready_at - now)

    def ran(self, seconds: float, now: float) -> None:
        """Take note of a quantum that has just ended."""
        self._ready_at = max(self._ready_at, now - seconds) + seconds * (1 + self._rest)  # a burst adds up
