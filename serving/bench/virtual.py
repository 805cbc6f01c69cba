"""`Simulation`: the real governor and predictor on a virtual clock, over an engine of fitted latencies.

The engine batches continuously, as SGLang's scheduler does: requests that wait are prefilled first, in chunks, up to a
number of running requests; else all running requests decode one token. What the radix cache holds of a prompt is not
computed. Between two iterations training runs by the co-trainer's rule; while the engine is idle, quanta run one at a
time until a request comes. One quantum is outstanding at a time: on a machine with a lag it ends later than it was
launched, the engine goes on meanwhile, and the co-trainer learns of its end at its next look. A request that arrives
while the host runs or launches a quantum is seen by the engine only after that. All times are seconds.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import NamedTuple

from serving.bench.machines import Machine, TimedQuantum, calibrated
from serving.bench.outcome import Answered, Outcome
from serving.bench.trace import Arrival
from serving.cotrainer.governor import Finished, Governor, Load, Stream, Waiting
from serving.cotrainer.predictor import Batch, Predictor, prefill_batch

CLOSE = 1e-9
"""Seconds by which sums of floats may differ."""


@dataclass(eq=False, slots=True)
class _Request:
    arrival: Arrival
    trained_at_arrival: float
    """Seconds of training so far when it came."""
    computed: int
    """Prompt tokens in the cache, those of earlier chunks included."""
    tokens: int = 0
    """Tokens after the first."""
    first_token: float = 0.0
    trained_at_first: float = 0.0


class _Run(NamedTuple):
    """A quantum that runs or has run, from its launch on."""

    quantum: TimedQuantum
    launched: float
    starts: float
    """Time at which the device begins with it."""
    ends: float
    seconds: float
    """Host time of the launch, and device time."""


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
        self._outstanding: _Run | None = None
        self._last_run_ended = 0.0
        """End of the last quantum that the host ran itself."""
        beside = machine.launch_s + (machine.lag_s or 0.0)
        self._step_s = sum(quantum.seconds + beside for quantum in machine.quanta)
        self._noise = machine.factors(seed)

    def run(self, seconds: float) -> Outcome:
        """Run for at least `seconds`, and until every request has been answered."""
        while self.now < seconds or self._arrivals or self._waiting or self._running:
            self._receive()
            if self._waiting or self._running:
                self._turn()
            else:
                self._idle(self._arrivals[0].at if self._arrivals else seconds)
        self.outcome.seconds = self.now
        self.outcome.steps /= len(self.machine.quanta)
        return self.outcome

    def _receive(self) -> None:
        while self._arrivals and self._arrivals[0].at <= self.now:
            arrival = self._arrivals.popleft()
            during = max(0.0, self._last_run_ended - arrival.at)  # if it came while the host ran the last quantum
            self._waiting.append(_Request(arrival, self.outcome.trained_s - during, arrival.cached))

    def _arrived(self) -> bool:
        return bool(self._arrivals) and self._arrivals[0].at <= self.now

    def _idle(self, until: float) -> None:
        """Train or sleep until the time `until`, at which the next request comes or the run ends."""
        if self.governor is None:
            self.now = max(self.now, until)
        free = False  # True if no rest followed the last quantum
        while self.governor is not None and self.now < until:
            if self._outstanding is not None:
                self.now = min(self._outstanding.ends, until)
                self._book()
                continue
            rest = self.governor.wait(self.now)
            if rest > 0:
                self.now, free = min(self.now + rest, until), False
            elif free and until - self.now > 2 * self._step_s:
                self._step()
            else:
                self._launch()
                free = True
        if self._arrived() and self._last_run_ended == self.now:
            self.outcome.preemptions += 1

    def _turn(self) -> None:
        """Run the quanta that fit and one iteration, and report what the observer sees of it at its next look."""
        self._book()
        looked, trained = self.now, self.outcome.trained_s
        runs = [] if self._outstanding is None else [self._outstanding]
        if self.governor is not None:
            self._between_iterations(self.governor, runs)
        prefilled = list(self._to_prefill()) if self._waiting else []
        batch = self._batch(prefilled)
        alone = self.machine.seconds(batch) * next(self._noise) + self.machine.turn_s
        self.now += self._delayed(alone)
        if runs:
            self._count_met(runs, looked)
        self._book()
        seconds, trained = self.now - looked, self.outcome.trained_s - trained
        if runs:
            self.predictor.observe_beside(batch, seconds, trained, settled=self._outstanding is None)
        else:
            self.outcome.learnt += 1
            self.outcome.misbooked += abs(seconds - alone) > CLOSE
            self.predictor.observe(batch, seconds)
        if self.governor is not None:
            self.governor.iterated(batch, seconds - self.predictor.overlap * trained)
        self._advance(prefilled)

    def _between_iterations(self, governor: Governor, runs: list[_Run]) -> None:
        """Run or launch quanta by the co-trainer's rule, and add them to the `runs` of this turn."""
        left = governor.budget(self._load(), self.now)
        began = 0.0
        while left > 0 and self._outstanding is None and self.predictor.quantum_high(self._next) <= left:
            arrived = self._arrived()
            if runs and (self._waiting or arrived):
                self.outcome.preemptions += arrived
                break
            runs.append(self._launch())
            left -= runs[-1].seconds
            began += runs[-1].seconds
        self.outcome.longest_training = max(self.outcome.longest_training, began)

    def _launch(self) -> _Run:
        """Run the next quantum, or launch it on the device."""
        quantum, self._next, launched = self._next, next(self._quanta), self.now
        device_s = quantum.seconds * next(self._noise)
        self.now += self.machine.launch_s
        starts = self.now + (self.machine.lag_s or 0.0)
        ends, seconds = starts + device_s, self.machine.launch_s + device_s
        self._outstanding = run = _Run(quantum, launched, starts, ends, seconds)
        if self.machine.lag_s is None:
            self.now = self._last_run_ended = ends
            self._book()
        for arrival in self._arrivals:
            if arrival.at > ends:
                break
            if arrival.at > launched:
                self.outcome.preemption_s.append(ends - arrival.at)
        return run

    def _book(self) -> None:
        """Count the outstanding quantum if it has ended."""
        run = self._outstanding
        if run is not None and run.ends <= self.now:
            self._outstanding = None
            self.outcome.trained_s += run.seconds
            self.outcome.steps += 1
            self.predictor.observe_quantum(run.quantum, run.seconds)
            if self.governor is not None:
                self.governor.ran(run.seconds, self.now)

    def _step(self) -> None:
        """Run a whole optimizer step at once, for speed: only while no request can come before its end."""
        assert self.governor is not None
        self.now += self._step_s
        self.outcome.trained_s += self._step_s
        self.outcome.steps += len(self.machine.quanta)
        self.governor.ran(self._step_s, self.now)

    def _delayed(self, alone: float) -> float:
        """Return the seconds of an iteration that begins now and takes `alone` without the outstanding quantum."""
        run, overlap = self._outstanding, self.machine.overlap
        before = alone if run is None else max(0.0, run.starts - self.now)
        if run is None or before >= alone:
            return alone
        beside = alone - before
        delayed = beside + overlap * (run.ends - self.now - before)
        # The second where the quantum outlasts the iteration.
        return before + (delayed if overlap >= 1 else min(delayed, beside / (1 - overlap)))

    def _count_met(self, runs: Sequence[_Run], looked: float) -> None:
        """Count the quanta of this turn that each request met before its first token."""
        came = [max(looked, request.arrival.at) for request in self._waiting]
        for arrival in self._arrivals:
            if arrival.at >= self.now:
                break
            came.append(arrival.at)
        for at in came:
            met = sum(run.ends > at and run.launched < self.now for run in runs)
            self.outcome.most_met = max(self.outcome.most_met, met)

    def _load(self) -> Load:
        streams = [
            Stream(r.first_token, r.tokens, a.prompt + 1 + r.tokens, a.interactive)
            for r in self._running
            for a in (r.arrival,)
        ]
        waiting = [
            Waiting(a.at, a.prompt - r.computed, a.interactive, r.computed, r.computed - a.cached)
            for r in self._waiting
            for a in (r.arrival,)
        ]
        return Load(tuple(streams), tuple(waiting))

    def _batch(self, prefilled: Sequence[tuple[_Request, int]]) -> Batch:
        if prefilled:
            return prefill_batch((new, request.computed) for request, new in prefilled)
        kv = sum(r.arrival.prompt + 1 + r.tokens for r in self._running)
        return Batch("decode", len(self._running), cached_tokens=kv)

    def _to_prefill(self) -> Iterator[tuple[_Request, int]]:
        left, room = self.machine.chunk_tokens, self.machine.max_running - len(self._running)
        for request in list(self._waiting)[:room]:
            new = min(left, request.arrival.prompt - request.computed)
            if new <= 0:
                return
            left -= new
            yield request, new

    def _advance(self, prefilled: Sequence[tuple[_Request, int]]) -> None:
        """Give each request of the iteration its token, or its part of the prompt."""
        if not prefilled:
            for request in self._running:
                request.tokens += 1
        for request, new in prefilled:
            request.computed += new
            if request.computed == request.arrival.prompt:
                request.first_token = self.now
                request.trained_at_first = self.outcome.trained_s
                self._waiting.remove(request)
                self._running.append(request)
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
                asked = r.arrival.prompt - r.arrival.cached
                answered = Finished(ttft, tpot, r.tokens, asked, before, after, r.arrival.interactive)
                self.governor.finished(answered, self.now)
