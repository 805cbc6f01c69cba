"""How much training fits before the next iteration without breaking a latency target. Pure: time is an argument.

The decision is taken once per scheduler iteration, as in MACE (arXiv 2510.03283), from the slack of the tightest
request:

    TPOT slack of a stream with n tokens after its first, t seconds ago:  (n + 1) · S_tpot · (1 − m) − t − T − reserve
    TTFT slack of a request that waits since a:                           S_ttft · (1 − m) − (now − a) − T_prefill

T is the predicted iteration without training. The first line is a token bucket in seconds, one per stream, that fills
by S_tpot − T with each token; a mean over a request is what its user was promised, so what was not used stays his. The
margins m are integral controllers on the share of requests that met their target but for training.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from serving.cotrainer.predictor import Batch, Predictor

THETA = 0.1
"""The part of a waiting request's TTFT slack that may be spent at a time: others may come and wait as well."""
MARGIN = (0.02, 0.9)
MARGIN_START = 0.3
"""Careful at first: a margin that is learnt from late requests costs late requests."""
MARGIN_STEP = 0.1
"""Added to a margin by each request that training made late; taken back in steps that balance at the allowed share."""
INDIRECT = 3.0
"""Seconds by which a second of training may have delayed a request: one that lives longer meets more prefills."""
CLEAN_EVERY = 64
"""Decode iterations after which one runs without training, so that the predictor sees one."""
PREFILL_HORIZON = 8
"""Iterations within which a prefill is expected to interrupt a stream."""
RATE = 0.05
"""Of the moving averages."""
FLOOR_WINDOW_S = 60.0
"""How long training that `share_floor` promised may be made up for."""
LONGEST_ITERATION_S = 1.0
ACCELERATOR_QUANTUM_S = 2e-3
IDLE_PART = 0.1
"""Of S_ttft: what a quantum of an idle engine may take."""


@dataclass(frozen=True)
class Slo:
    """Targets: `quantile` of all requests within `ttft_s` to the first token and a mean of `tpot_s` per later one."""

    ttft_s: float
    tpot_s: float
    quantile: float = 0.99
    batch_factor: float = 10.0
    """How many times as long a request of the batch class may take."""

    def factor(self, interactive: bool) -> float:
        return 1.0 if interactive else self.batch_factor


@dataclass(frozen=True)
class Stream:
    """A request that is being decoded."""

    first_token: float
    """When its first token was there."""
    tokens: int
    """Tokens after the first."""
    context: int
    """Tokens in its KV cache."""
    interactive: bool = True


@dataclass(frozen=True)
class Waiting:
    """A request that has no token yet."""

    arrival: float
    prompt_tokens: int
    """What is still to be computed of its prompt."""
    interactive: bool = True


@dataclass(frozen=True)
class Load:
    """What the engine has to do, before one iteration."""

    streams: tuple[Stream, ...] = ()
    waiting: tuple[Waiting, ...] = ()

    @property
    def idle(self) -> bool:
        return not (self.streams or self.waiting)

    @property
    def decode(self) -> Batch:
        """The decode iteration of the streams."""
        return Batch("decode", len(self.streams), cached_tokens=sum(stream.context for stream in self.streams))

    @property
    def prefill(self) -> Batch:
        """The prefill of all that wait, as if none of it were cached."""
        tokens = [request.prompt_tokens for request in self.waiting]
        return Batch("prefill", len(tokens), sum(tokens), sum(count * count // 2 for count in tokens))


@dataclass(frozen=True)
class Finished:
    """A request that has been answered, in seconds."""

    ttft: float
    tpot: float | None
    """None for an answer of one token."""
    tokens: int
    """Tokens after the first."""
    trained_before_first: float = 0.0
    """Training between its arrival and its first token."""
    trained_after_first: float = 0.0
    interactive: bool = True


class Governor(Protocol):
    """What the co-trainer asks, and tells."""

    slo: Slo | None

    def budget(self, load: Load, now: float) -> float:
        """Seconds of quanta that may run before the next iteration of a busy engine."""

    def wait(self, now: float) -> float:
        """Seconds until an idle engine may run its next quantum."""

    def ran(self, seconds: float, now: float) -> None:
        """A quantum has just ended."""

    def iterated(self, batch: Batch, seconds: float) -> None:
        """An iteration has just ended."""

    def finished(self, request: Finished) -> None:
        """A request has been answered."""


class SloGovernor:
    """All the training that the targets leave room for, never more than `share_cap` of the time.

    `share_floor` of it runs even where it breaks the targets: `slo_debt_s` says for how many seconds it did. Without
    targets, or before the predictor knows the engine, it trains only while nobody is served.
    """

    def __init__(
        self, slo: Slo | None, predictor: Predictor, *, share_floor: float = 0.0, share_cap: float = 1.0
    ) -> None:
        self.slo = slo
        self.predictor = predictor
        self.share_floor = share_floor
        self.margin_ttft = self.margin_tpot = MARGIN_START
        self.slo_debt_s = 0.0
        self.answered = self.met = 0
        self._rest = 1 / share_cap - 1
        self._ready_at = -math.inf
        self._owed = 0.0
        self._owed_at: float | None = None
        self._on_debt = False
        self._closed = False
        self._decodes = 0
        self._prefill_s = 0.0
        self._prefill_rate = 0.0

    def budget(self, load: Load, now: float) -> float:
        """Seconds of quanta that may run before the next iteration of a busy engine."""
        self._accrue(now)
        self._on_debt = False
        if not now >= self._ready_at:  # nor if one of them is NaN
            return 0.0
        slack = self._slack(load, now)
        slack = slack if math.isfinite(slack) else 0.0  # a dead input closes
        longest = self.predictor.longest_quantum()
        if self._owed > 0 and slack < longest:
            self._on_debt = True
            return max(slack, min(self._owed, longest))
        return max(0.0, slack)

    def wait(self, now: float) -> float:
        """Seconds until an idle engine may run its next quantum."""
        self._closed = False
        rest = self._ready_at - now
        return math.inf if math.isnan(rest) else max(0.0, rest)

    def ran(self, seconds: float, now: float) -> None:
        """A quantum has just ended: after t seconds none follows for t · (1/share_cap − 1)."""
        self._ready_at = max(self._ready_at, now - seconds) + seconds * (1 + self._rest)  # a burst adds up
        self._owed = max(self._owed - seconds, -FLOOR_WINDOW_S * self.share_floor)
        if self._on_debt:
            self.slo_debt_s += seconds

    def iterated(self, batch: Batch, seconds: float) -> None:
        """Learn how often a prefill comes between two tokens of a stream, and how long it takes."""
        prefill = batch.regime == "prefill"
        self._prefill_rate += RATE * (prefill - self._prefill_rate)
        if prefill:
            self._prefill_s += RATE * (seconds - self._prefill_s) if self._prefill_s else seconds
        else:
            self._decodes += 1

    def finished(self, request: Finished) -> None:
        """Move the margins: up by a request that would have been in time without training, down by all others."""
        if self.slo is None:
            return
        factor = self.slo.factor(request.interactive)
        self.answered += 1
        self.met += request.ttft <= self.slo.ttft_s * factor and (request.tpot or 0.0) <= self.slo.tpot_s * factor
        late = _made_late(request.ttft, request.trained_before_first, self.slo.ttft_s * factor)
        self.margin_ttft = self._moved(self.margin_ttft, late)
        if request.tpot is not None:
            trained = request.trained_after_first / request.tokens
            late = _made_late(request.tpot, trained, self.slo.tpot_s * factor)
            self.margin_tpot = self._moved(self.margin_tpot, late)

    def _moved(self, margin: float, late: bool) -> float:
        assert self.slo is not None
        allowed = (1 - self.slo.quantile) / 4  # half each for TTFT and TPOT, and half of that: not all is noticed
        return min(max(margin + MARGIN_STEP * (late - allowed), MARGIN[0]), MARGIN[1])

    def _slack(self, load: Load, now: float) -> float:
        """Seconds that can be spent now, by the tightest request; negative or zero is none."""
        if load.idle:
            return self._burst()
        if self.slo is None or not self.predictor.ready:
            return 0.0
        # Once closed it stays so until nobody waits: at most one close for each arrival (Valve's bounded rate).
        self._closed = self._closed and bool(load.waiting)
        if self._closed or (self._decodes % CLEAN_EVERY == 0 and not load.waiting):
            return 0.0
        slack = _least((self._tpot_slack(load, now), self._burst()))
        if not load.waiting:
            return slack / max(self.predictor.overlap, 0.1)
        slack = _least((slack, THETA * self._ttft_slack(load, now))) / max(self.predictor.overlap, 0.1)
        self._closed = not slack >= self.predictor.longest_quantum()
        return 0.0 if self._closed else slack

    def _tpot_slack(self, load: Load, now: float) -> float:
        assert self.slo is not None
        promised = self.slo.tpot_s * (1 - self.margin_tpot)
        needed = self.predictor.high(load.decode) + self._reserve()
        return _least(
            (stream.tokens + 1) * promised * self.slo.factor(stream.interactive) - (now - stream.first_token) - needed
            for stream in load.streams
        )

    def _ttft_slack(self, load: Load, now: float) -> float:
        assert self.slo is not None
        promised = self.slo.ttft_s * (1 - self.margin_ttft)
        needed = self.predictor.high(load.prefill)
        return _least(
            promised * self.slo.factor(request.interactive) - (now - request.arrival) - needed
            for request in load.waiting
        )

    def _reserve(self) -> float:
        """What a stream keeps for a prefill that is likely to come between two of its tokens."""
        return self._prefill_s * min(1.0, self._prefill_rate * PREFILL_HORIZON)

    def _burst(self) -> float:
        """The longest pause between two iterations: a stream that saved up must not be spent on one long stall."""
        tpot = self.slo.tpot_s if self.slo is not None else 0.0
        return self.predictor.longest_quantum() + 0.5 * tpot

    def _accrue(self, now: float) -> None:
        """Time passes: training is owed `share_floor` of it."""
        if self._owed_at is not None:
            passed = min(max(0.0, now - self._owed_at), LONGEST_ITERATION_S)  # more is time without a job
            owed = self._owed + self.share_floor * passed
            self._owed = min(owed, FLOOR_WINDOW_S * self.share_floor)
        self._owed_at = now


def quantum_target(slo: Slo, predictor: Predictor, accelerator: bool) -> float:
    """Q*: the longest that a quantum should be, by its P99.

    On a CPU half of what an iteration leaves of S_tpot; an accelerator interleaves finer.
    """
    if accelerator:
        return min(ACCELERATOR_QUANTUM_S, 0.1 * slo.tpot_s)
    return max(0.5 * (slo.tpot_s - predictor.typical("decode")), 0.05 * slo.tpot_s)


def idle_quantum_target(slo: Slo, busy: float) -> float:
    """Q* while nobody is served: then all that a quantum can delay is the first token of who comes next."""
    return max(busy, IDLE_PART * slo.ttft_s)


def default_slo(predictor: Predictor, quantile: float = 0.99) -> Slo | None:
    """Targets for a site that set none: twice the measured time per token, three times that to the first."""
    if not predictor.ready:
        return None
    decode, prefill = predictor.typical("decode"), predictor.typical("prefill")
    return Slo(ttft_s=3 * (prefill + decode), tpot_s=2 * decode, quantile=quantile)


def _made_late(seconds: float, trained: float, target: float) -> bool:
    return seconds > target >= seconds - INDIRECT * trained


def _least(values: Iterable[float]) -> float:
    """The smallest, or NaN if one is: min() alone would pass over it."""
    found = tuple(values)
    return math.nan if any(map(math.isnan, found)) else min(found, default=math.inf)
