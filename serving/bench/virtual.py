"""`Simulation`: the real governor and predictor on a virtual clock, over an engine of fitted latencies.

The engine batches continuously, as SGLang's scheduler does: requests that wait are prefilled first, in chunks, up to a
number of running requests; else all running requests decode one token. Between two iterations training runs by the
co-trainer's rule; while the engine is idle, quanta run one at a time until a request comes. A request that
arrives during training is seen by the engine only when the quantum has ended, and batched an iteration later if the
engine was busy: SGLang reads its sockets once per turn. All times are seconds.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle

from serving.bench.machines import Machine, calibrated
from serving.bench.trace import Arrival
from serving.cotrainer.governor import Finished, Governor, Load, Stream, Waiting
from serving.cotrainer.predictor import Batch, Predictor
from serving.cotrainer.slo import Slo


@dataclass(frozen=True)
class Answered:
    """A request and the latencies of its answer."""

    arrival: Arrival
    ttft: float
    tpot: float | None
    """None for an answer of one token."""

    def in_time(self, slo: Slo) -> tuple[bool, bool]:
        """Return whether the first token, and the later ones, were in time."""
        factor = slo.factor(self.arrival.interactive)
        return self.ttft <= slo.ttft_s * factor, self.tpot is None or self.tpot <= slo.tpot_s * factor


@dataclass
class Outcome:
    """Results of one simulated site."""

    answered: list[Answered] = field(default_factory=list)
    seconds: float = 0.0
    trained_s: float = 0.0
    steps: float = 0.0
    longest_training: float = 0.0
    """Longest training between two iterations of a busy engine."""
    preemption_s: list[float] = field(default_factory=list)
    """For each request that arrived while a quantum ran, the time until that quantum ended."""
    preemptions: int = 0
    """Times that training stopped because a request had come."""

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


@dataclass(eq=False)
class _Request:
    arrival: Arrival
    trained_at_arrival: float
    """Seconds of training so far when it came."""
    computed: int = 0
    """Prompt tokens computed so far."""
    tokens: int = 0
    """Tokens after the first."""
    first_token: float = 0.0
    trained_at_first: float = 0.0
    last_token: float = 0.0


class Simulation:
    """One simulated site."""

    def __init__(
        self,
        machine: Machine,
        arrivals: Sequence[Arrival],
        governor: Governor | None = None,
        predictor: Predictor | None = None,
        *,
        seed: int = 0,
    ) -> None:
        """Prepare a run over `arrivals`; without a governor nothing is trained."""
        self.machine = machine
        self.governor = governor
        self.predictor = predictor or calibrated(machine)
        self.outcome = Outcome()
        self.now = 0.0
        self._arrivals = deque(arrivals)
        self._waiting: deque[_Request] = deque()
        self._running: list[_Request] = []
        self._quanta = cycle(machine.quanta)
        self._next = next(self._quanta)
        self._quantum_ended = 0.0
        self._step_s = sum(quantum.seconds for quantum in machine.quanta)
        self._noise = machine.factors(seed)

    def run(self, seconds: float) -> Outcome:
        """Run for at least `seconds`, and until every request has been answered."""
        while self.now < seconds or self._arrivals or self._waiting or self._running:
            self._receive()
            if self._waiting or self._running:
                trained = self._between_iterations()
                self._iterate(trained)
            else:
                self._idle(self._arrivals[0].at if self._arrivals else seconds)
        self.outcome.seconds = self.now
        self.outcome.steps /= len(self.machine.quanta)
        return self.outcome

    def _receive(self) -> None:
        while self._arrivals and self._arrivals[0].at <= self.now:
            arrival = self._arrivals.popleft()
            during = max(0.0, self._quantum_ended - arrival.at)  # if it came while the last quantum ran
            self._waiting.append(_Request(arrival, self.outcome.trained_s - during))

    def _arrived(self) -> bool:
        return bool(self._arrivals) and self._arrivals[0].at <= self.now

    def _idle(self, until: float) -> None:
        """Train or sleep until the time `until`, at which the next request comes or the run ends."""
        if self.governor is None:
            self.now = max(self.now, until)
        free = False  # True if no rest followed the last quantum
        while self.governor is not None and self.now < until:
            rest = self.governor.wait(self.now)
            if rest > 0:
                self.now, free = min(self.now + rest, until), False
            elif free and until - self.now > 2 * self._step_s:
                self._step()
            else:
                self._quantum()
                free = True
        if self._arrived() and self._quantum_ended == self.now:
            self.outcome.preemptions += 1

    def _between_iterations(self) -> float:
        """Run quanta by the co-trainer's rule; return their seconds."""
        if self.governor is None:
            return 0.0
        left = self.governor.budget(self._load(), self.now)
        trained = 0.0
        while self.predictor.quantum_high(self._next) <= left:
            if trained and self._waiting:
                break
            seconds = self._quantum()
            left -= seconds
            trained += seconds
            if self._arrived():
                self.outcome.preemptions += 1
                break
        self.outcome.longest_training = max(self.outcome.longest_training, trained)
        return trained

    def _quantum(self) -> float:
        assert self.governor is not None
        quantum, self._next = self._next, next(self._quanta)
        seconds = quantum.seconds * next(self._noise)
        began = self.now
        self.now += seconds
        for arrival in self._arrivals:
            if arrival.at > self.now:
                break
            if arrival.at > began:
                self.outcome.preemption_s.append(self.now - arrival.at)
        self._quantum_ended = self.now
        self.outcome.trained_s += seconds
        self.outcome.steps += 1
        self.predictor.observe_quantum(quantum, seconds)
        self.governor.ran(seconds, self.now)
        return seconds

    def _step(self) -> None:
        """Run a whole optimizer step at once, for speed: only while no request can come before its end."""
        assert self.governor is not None
        self.now += self._step_s
        self.outcome.trained_s += self._step_s
        self.outcome.steps += len(self.machine.quanta)
        self.governor.ran(self._step_s, self.now)

    def _load(self) -> Load:
        return Load(
            tuple(
                Stream(r.first_token, r.tokens, r.arrival.prompt + 1 + r.tokens, r.arrival.interactive)
                for r in self._running
            ),
            tuple(Waiting(r.arrival.at, r.arrival.prompt - r.computed, r.arrival.interactive) for r in self._waiting),
        )

    def _iterate(self, trained: float) -> None:
        prefilled = list(self._to_prefill())
        if prefilled:
            batch = _prefill_batch(prefilled)
        else:
            kv = sum(r.arrival.prompt + 1 + r.tokens for r in self._running)
            batch = Batch("decode", len(self._running), cached_tokens=kv)
        alone = self.machine.seconds(batch) * next(self._noise) + self.machine.turn_s
        # The clock has counted the training in full: subtract the time in which both ran at once.
        shared = min((1 - self.machine.overlap) * trained, alone)
        self.now += alone - shared
        self.predictor.observe(batch, alone + trained - shared, trained)
        if self.governor is not None:
            self.governor.iterated(batch, alone)
        if not prefilled:
            for request in self._running:
                request.tokens += 1
            self._finish()
            return
        for request, new in prefilled:
            request.computed += new
            if request.computed == request.arrival.prompt:
                request.first_token = self.now
                request.trained_at_first = self.outcome.trained_s
                self._waiting.remove(request)
                self._running.append(request)
        self._finish()

    def _to_prefill(self) -> Iterator[tuple[_Request, int]]:
        left, room = self.machine.chunk_tokens, self.machine.max_running - len(self._running)
        for request in list(self._waiting)[:room]:
            new = min(left, request.arrival.prompt - request.computed)
            if new <= 0:
                return
            left -= new
            yield request, new

    def _finish(self) -> None:
        done = [r for r in self._running if r.tokens + 1 >= r.arrival.output]
        if not done:
            return
        self._running = [r for r in self._running if r.tokens + 1 < r.arrival.output]
        for r in done:
            ttft = r.first_token - r.arrival.at
            tpot = (self.now - r.first_token) / r.tokens if r.tokens else None
            self.outcome.answered.append(Answered(r.arrival, ttft, tpot))
            if self.governor is not None:
                before = r.trained_at_first - r.trained_at_arrival
                after = self.outcome.trained_s - r.trained_at_first
                answered = Finished(ttft, tpot, r.tokens, before, after, r.arrival.interactive)
                self.governor.finished(answered, self.now)


def _prefill_batch(prefilled: Sequence[tuple[_Request, int]]) -> Batch:
    return Batch(
        "prefill",
        len(prefilled),
        sum(new for _, new in prefilled),
        sum(new * (new // 2 + request.computed) for request, new in prefilled),
        sum(request.computed for request, _ in prefilled),
    )
