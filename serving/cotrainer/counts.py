"""`Counts`: the quanta that ran since the engine's start, and how training made way for requests."""

from collections import deque
from dataclasses import dataclass
from typing import Literal

from serving.cotrainer.lanes.lane import Took
from serving.trainer_socket import PreemptionStats, QuantumStats

KEPT_PREEMPTIONS = 4096
"""The latest preemptions, over which the quantiles are taken."""


@dataclass
class _Tally:
    """The fields of a QuantumStats, without the cost of making one for each quantum."""

    count: int = 0
    seconds: float = 0.0
    launch_s: float = 0.0
    longest_s: float = 0.0


class Counts:
    """Figures for `umbel status`; nothing is decided by them. All times are seconds."""

    def __init__(self) -> None:
        self._quanta: dict[str, _Tally] = {}
        self.hook_calls: dict[Literal["busy", "idle"], int] = {"busy": 0, "idle": 0}
        """Calls in which a job was there to be trained."""
        self.most_while_waiting = 0
        """The most quanta that one hook call ran while a request waited; the bound is 1."""
        self.last_quantum_s = 0.0
        self._preempted = 0
        self._preemptions: deque[float] = deque(maxlen=KEPT_PREEMPTIONS)
        self._cut_short: float | None = None
        """Seconds of the quantum during which something arrived, until it is known whether that was a request."""

    @property
    def quanta(self) -> dict[str, QuantumStats]:
        """Return for each kind of quantum how many ran, and for how long."""
        return {kind: QuantumStats(**vars(tally)) for kind, tally in self._quanta.items()}

    def ran(self, kind: str, took: Took) -> None:
        """Count a quantum that has ended."""
        self.last_quantum_s = took.seconds
        tally = self._quanta.setdefault(kind, _Tally())
        tally.count += 1
        tally.seconds += took.seconds
        tally.launch_s += took.launch_s
        tally.longest_s = max(tally.longest_s, took.seconds)

    def stopped(self, *, by_arrival: bool) -> None:
        """Note that training has stopped, and whether it did because something lay on one of the engine's sockets."""
        self._cut_short = self.last_quantum_s if by_arrival else None

    def settle(self, requests_came: bool) -> None:
        """Count a stop as a preemption if a request had arrived, and not only another message."""
        if self._cut_short is not None and requests_came:
            self._preempted += 1
            self._preemptions.append(self._cut_short)
        self._cut_short = None

    def preemption(self, arrivals: int) -> PreemptionStats:
        """Return how long requests waited for the quantum that they met, of `arrivals` requests in all."""
        waits = sorted(self._preemptions) or [0.0]
        return PreemptionStats(
            arrivals=arrivals,
            count=self._preempted,
            p50_s=waits[len(waits) // 2],
            p99_s=waits[int(len(waits) * 0.99)],
            longest_s=waits[-1],
        )

    def forget_requests(self) -> None:
        """Start the figures about requests at zero again; the benchmark does so for each of its blocks."""
        self._preemptions.clear()
        self._preempted = self.most_while_waiting = 0
