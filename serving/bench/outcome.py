"""`Outcome`: what a simulated site did, and the simulator's own truth beside it."""

from dataclasses import dataclass, field

from serving.bench.trace import Arrival
from serving.cotrainer.slo import Slo


@dataclass(frozen=True)
class Answered:
    """A request and the latencies of its answer, in seconds."""

    arrival: Arrival
    ttft: float
    tpot: float | None
    """None for an answer of one token."""

    def in_time(self, slo: Slo) -> tuple[bool, bool]:
        """Return whether the first token, and the later ones, were in time."""
        factor, asked = slo.factor(self.arrival.interactive), self.arrival.prompt - self.arrival.cached
        return self.ttft <= slo.first_token_s(asked) * factor, self.tpot is None or self.tpot <= slo.tpot_s * factor


@dataclass
class Outcome:
    """Results of one simulated site."""

    answered: list[Answered] = field(default_factory=list)
    seconds: float = 0.0
    trained_s: float = 0.0
    """Seconds of the quanta that have ended: host time of their launch, and device time."""
    steps: float = 0.0
    longest_training: float = 0.0
    """Longest training, in seconds, that was begun between two iterations of a busy engine."""
    preemption_s: list[float] = field(default_factory=list)
    """For each request that arrived while a quantum ran, the time until that quantum ended."""
    preemptions: int = 0
    """Times that training stopped because a request had come."""
    most_met: int = 0
    """Largest number of quanta that ran, in any part of one iteration, while one request waited for its first token."""
    learnt: int = 0
    """Iterations that the predictor was given as free of training."""
    misbooked: int = 0
    """Those of them whose seconds were not what their own batch takes alone."""

    def attainment(self, slo: Slo) -> tuple[float, float, float]:
        """Return the shares of requests in time: TTFT, TPOT, both; 1 without requests."""
        met = [request.in_time(slo) for request in self.answered]
        count = max(len(met), 1)
        first, later, both = sum(f for f, _ in met), sum(t for _, t in met), sum(f and t for f, t in met)
        return (first / count, later / count, both / count) if met else (1.0, 1.0, 1.0)

    @property
    def ttft(self) -> list[float]:
        return [request.ttft for request in self.answered]

    @property
    def tpot(self) -> list[float]:
        return [request.tpot for request in self.answered if request.tpot is not None]

    @property
    def share(self) -> float:
        """Return the share of the time in which quanta ran."""
        return self.trained_s / self.seconds if self.seconds else 0.0
