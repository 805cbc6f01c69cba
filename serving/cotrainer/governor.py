"""`SloGovernor`: decides how many seconds of training fit before the next iteration without breaking a latency target.

Pure: time is an argument. The decision is taken once per scheduler iteration, as in MACE (arXiv 2510.03283), from the
slack of the tightest request:

    TPOT slack of a stream with n tokens after its first, t seconds ago:  (n + 1) · S_tpot · (1 − m) − t − T − reserve
    TTFT slack of a request that waits since a:                           S_ttft(p) · (1 − m) − (now − a) − T_prefill

T is the predicted iteration without training, p the prompt tokens that were to be computed. The first line is a token
bucket in seconds, one per stream, that fills by S_tpot − T with each token: the target is a mean over the request, so
time that early tokens saved is there for later ones. The margins m are those of `slo.Margin`: they move with the
requests beside which something was trained.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from serving.cotrainer.predictor import Batch, Predictor, prefill_batch
from serving.cotrainer.slo import Margin, Slo

THETA = 0.1
"""Share of a waiting request's TTFT slack that may be spent at a time: others may come and wait as well."""
PAUSE_S = 60.0
"""After so long without a job the load may be another one, and the margins are at least at their start again."""
INDIRECT = 3.0
"""Seconds by which one second of training may delay a request: a request that lives longer meets more prefills."""
CLEAN_EVERY = 64
"""One in so many decode iterations runs without training, so that the predictor sees the engine alone."""
PREFILL_HORIZON = 8
"""Iterations within which a prefill is expected to interrupt a stream."""
RATE = 0.05
"""Weight of a new value in the moving averages."""
FLOOR_WINDOW_S = 60.0
"""Training that `share_floor` promises is made up for at most this much later."""
LONGEST_ITERATION_S = 1.0
"""A longer time between two iterations passed without a job, and no training is owed for it."""


class Stream(NamedTuple):
    """A request that is being decoded."""

    first_token: float
    """Time of its first token."""
    tokens: int
    """Tokens after the first."""
    context: int
    """Tokens in its KV cache."""
    interactive: bool = True


class Waiting(NamedTuple):
    """A request that has no token yet."""

    arrival: float
    prompt_tokens: int
    """Prompt tokens that are still to be computed."""
    interactive: bool = True
    cached_tokens: int = 0
    """Prompt tokens before them, whose keys and values are in the cache."""
    computed_tokens: int = 0
    """Those of the cached tokens that were computed since it came, in earlier chunks of its prompt."""

    @property
    def asked_tokens(self) -> int:
        """Return the prompt tokens that were to be computed when it came."""
        return self.prompt_tokens + self.computed_tokens


@dataclass(frozen=True)
class Load:
    """Requests that the engine has to work on, seen before one iteration."""

    streams: tuple[Stream, ...] = ()
    waiting: tuple[Waiting, ...] = ()

    @property
    def idle(self) -> bool:
        return not (self.streams or self.waiting)

    @property
    def decode(self) -> Batch:
        """Return the decode iteration of the streams."""
        return Batch("decode", len(self.streams), cached_tokens=sum(stream.context for stream in self.streams))

    @property
    def prefill(self) -> Batch:
        """Return the prefill of all waiting requests, as if it were one."""
        return prefill_batch((w.prompt_tokens, w.cached_tokens) for w in self.waiting)


class Finished(NamedTuple):
    """A request that has been answered, in seconds."""

    ttft: float
    tpot: float | None
    """None for an answer of one token."""
    tokens: int
    """Tokens after the first."""
    asked_tokens: int = 0
    """Prompt tokens that were to be computed when it came."""
    trained_before_first: float = 0.0
    """Training between its arrival and its first token."""
    trained_after_first: float = 0.0
    interactive: bool = True


class Governor(Protocol):
    """A rule for when to train. The co-trainer asks the first two methods and reports to the others."""

    slo: Slo | None

    def budget(self, load: Load, now: float) -> float:
        """Return the seconds of quanta that may run before the next iteration of a busy engine."""

    def wait(self, now: float) -> float:
        """Return the seconds until an idle engine may run its next quantum."""

    def ran(self, seconds: float, now: float) -> None:
        """Note a quantum that has just ended."""

    def iterated(self, batch: Batch, seconds: float) -> None:
        """Note an iteration that has just ended, without the seconds of training in it."""

    def finished(self, request: Finished, now: float) -> None:
        """Note a request that has been answered."""


class SloGovernor:
    """Allows all the training that the targets leave room for, at most a share `share_cap` of the time.

    A share `share_floor` of the time is trained even where that breaks the targets; `slo_debt_s` counts those seconds.
    Without targets, or before the predictor knows the engine, training is allowed only while nobody is served.

    Every method takes the time in seconds, on any clock that does not jump:

        >>> governor = SloGovernor(Slo.usual(0.4, 0.05), Predictor(), share_floor=0.0, share_cap=0.5)
        >>> governor.wait(now=10.0)  # idle: the next quantum may run at once
        0.0
        >>> governor.ran(0.02, now=10.02)  # it took 20 ms, and half of the time is to stay free
        >>> round(governor.wait(now=10.02), 3)
        0.02
        >>> governor.budget(Load(waiting=(Waiting(arrival=10.0, prompt_tokens=64),)), now=10.1)  # engine not yet known
        0.0
    """

    def __init__(self, slo: Slo | None, predictor: Predictor, *, share_floor: float, share_cap: float) -> None:
        self.slo = slo
        self.predictor = predictor
        self.share_floor = share_floor
        self.margin_ttft, self.margin_tpot = Margin(), Margin()
        self.slo_debt_s = 0.0
        self.answered = self.met = 0
        """Requests answered since there are targets, and those of them that met both."""
        self._rest = 1 / share_cap - 1
        self._ready_at = -math.inf
        self._asked_at = math.inf
        self._owed = 0.0
        self._owed_at: float | None = None
        self._on_debt = False
        self._closed = False
        self._decodes = 0
        self._prefill_s = 0.0
        self._prefill_rate = 0.0

    def budget(self, load: Load, now: float) -> float:
        """Return the seconds of quanta that may run before the next iteration of a busy engine."""
        self._asked(now)
        self._accrue(now)
        self._on_debt = False
        if not now >= self._ready_at:  # also true if one of them is NaN
            return 0.0
        slack = self._slack(load, now)
        slack = slack if math.isfinite(slack) else 0.0  # NaN from a broken input: no training
        longest = self.predictor.longest_quantum(busy=True)
        if self._owed > 0 and slack < longest:
            self._on_debt = True
            return max(slack, min(self._owed, longest))
        return max(0.0, slack)

    def wait(self, now: float) -> float:
        """Return the seconds until an idle engine may run its next quantum; infinity if the clock is NaN."""
        self._asked(now)
        self._closed = False
        rest = self._ready_at - now
        return math.inf if math.isnan(rest) else max(0.0, rest)

    def ran(self, seconds: float, now: float) -> None:
        """Note a quantum that has just ended; after t seconds none follows for t · (1/share_cap − 1) seconds."""
        self._ready_at = max(self._ready_at, now - seconds) + seconds * (1 + self._rest)  # quanta in a row add up
        self._owed = max(self._owed - seconds, -FLOOR_WINDOW_S * self.share_floor)
        if self._on_debt:
            self.slo_debt_s += seconds

    def iterated(self, batch: Batch, seconds: float) -> None:
        """Learn how often a prefill comes between two tokens of a stream, and the seconds that it takes."""
        prefill = batch.regime == "prefill"
        self._prefill_rate += RATE * (prefill - self._prefill_rate)
        if prefill:
            seconds = max(0.0, seconds)
            self._prefill_s += RATE * (seconds - self._prefill_s) if self._prefill_s else seconds
        else:
            self._decodes += 1

    def finished(self, request: Finished, now: float) -> None:
        """Count a request, and move the margins if something was trained while it waited for its tokens."""
        if self.slo is None:
            return
        factor = self.slo.factor(request.interactive)
        ttft_s, tpot_s = self.slo.first_token_s(request.asked_tokens) * factor, self.slo.tpot_s * factor
        self.answered += 1
        self.met += request.ttft <= ttft_s and (request.tpot or 0.0) <= tpot_s
        allowed = (1 - self.slo.quantile) / 4  # half each for TTFT and TPOT, and half of that: not all is noticed
        if request.trained_before_first > 0:
            late = _made_late(request.ttft, request.trained_before_first, ttft_s)
            self.margin_ttft.move(late, allowed, now)
        if request.trained_after_first > 0 and request.tpot is not None:
            late = _made_late(request.tpot, request.trained_after_first / request.tokens, tpot_s)
            self.margin_tpot.move(late, allowed, now)

    def _asked(self, now: float) -> None:
        """Note that there is a job, which asks for time; the first one after a pause begins with careful margins."""
        if now - self._asked_at > PAUSE_S:
            self.margin_ttft.start_again()
            self.margin_tpot.start_again()
        self._asked_at = now

    def _slack(self, load: Load, now: float) -> float:
        """Return the seconds that the tightest request leaves to be spent now; 0 or less: none."""
        if load.idle:
            return self._burst()
        if self.slo is None or not self.predictor.ready:
            return 0.0
        # Once closed, the gate stays closed until nobody waits: at most one close per arrival (Valve's bounded rate).
        self._closed = self._closed and bool(load.waiting)
        if self._closed or (self._decodes % CLEAN_EVERY == 0 and not load.waiting):
            return 0.0
        slack = _least((self._tpot_slack(load, now), self._burst()))
        if not load.waiting:
            return slack / max(self.predictor.overlap, 0.1)
        slack = _least((slack, THETA * self._ttft_slack(load, now))) / max(self.predictor.overlap, 0.1)
        self._closed = not slack >= self.predictor.longest_quantum(busy=True)
        return 0.0 if self._closed else slack

    def _tpot_slack(self, load: Load, now: float) -> float:
        assert self.slo is not None
        promised = self.slo.tpot_s * (1 - self.margin_tpot.value)
        needed = self.predictor.high(load.decode) + self._reserve()
        return _least(
            (stream.tokens + 1) * promised * self.slo.factor(stream.interactive) - (now - stream.first_token) - needed
            for stream in load.streams
        )

    def _ttft_slack(self, load: Load, now: float) -> float:
        assert self.slo is not None
        kept, needed = 1 - self.margin_ttft.value, self.predictor.high(load.prefill)
        return _least(
            self.slo.first_token_s(request.asked_tokens) * kept * self.slo.factor(request.interactive)
            - (now - request.arrival)
            - needed
            for request in load.waiting
        )

    def _reserve(self) -> float:
        """Return the seconds that a stream keeps for a prefill that is likely to come between two of its tokens."""
        return self._prefill_s * min(1.0, self._prefill_rate * PREFILL_HORIZON)

    def _burst(self) -> float:
        """Return the longest pause between two iterations: saved-up slack must not be spent on one long stall."""
        tpot = self.slo.tpot_s if self.slo is not None else 0.0
        return self.predictor.longest_quantum() + 0.5 * tpot

    def _accrue(self, now: float) -> None:
        """Add `share_floor` of the time since the last call to the seconds of training that are owed."""
        if self._owed_at is not None:
            passed = min(max(0.0, now - self._owed_at), LONGEST_ITERATION_S)
            owed = self._owed + self.share_floor * passed
            self._owed = min(owed, FLOOR_WINDOW_S * self.share_floor)
        self._owed_at = now


def _made_late(seconds: float, trained: float, target: float) -> bool:
    """Return whether a request was late, and would not have been without the training that ran meanwhile."""
    return seconds > target >= seconds - INDIRECT * trained


def _least(values: Iterable[float]) -> float:
    """Return the smallest value, or NaN if one of them is NaN: min() alone would pass over it."""
    found = tuple(values)
    return math.nan if math.isnan(sum(found)) else min(found, default=math.inf)
