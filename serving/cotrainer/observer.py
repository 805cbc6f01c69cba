"""`Observer`: reads SGLang's scheduler and describes its requests in the governor's terms. It changes nothing.

Every look happens on the scheduler's thread before an iteration. A request is taken to arrive at the last moment at
which it was certainly not there: SGLang notes it only when it reads its socket, which may be a quantum later. The
supervisor's checks (`Priority.CHECK`) are not seen at all: nobody waits for them, and nothing is learnt from them.

Each batch gets the time of its own iteration, also under SGLang's overlap loop. There a batch is launched while the one
before still runs, so its iteration begins when the result of the one before has been processed, and ends with its own.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from serving.cotrainer.governor import Finished, Load, Stream, Waiting
from serving.cotrainer.predictor import Batch, prefill_batch
from serving.priorities import Priority

MOST_RUNNING = 8
"""Batches that may be launched and not processed; SGLang's overlap loop has two."""


@dataclass
class _Request:
    """A request that is not yet answered. Times are seconds on the co-trainer's clock."""

    arrival: float
    trained: float
    """Seconds of training until its arrival; once it has a first token, until that."""
    interactive: bool
    cached: int
    """Tokens of its prompt that were in the engine's cache when it came."""
    first_token: float = 0.0
    trained_before_first: float = 0.0


@dataclass(frozen=True)
class Iteration:
    """An iteration that has ended: a batch, from the end of the one before to its own."""

    batch: Batch
    seconds: float
    trained: float
    """Seconds of the quanta that ended in it."""
    clean: bool
    """True if no quantum ran in any part of it."""
    settled: bool
    """True if no quantum was outstanding at its end."""


class _Moment(NamedTuple):
    """The state of training at a time (seconds on the co-trainer's clock)."""

    at: float
    trained: float
    launched: int
    ended: int


@dataclass
class _Running:
    """A batch that has been launched."""

    batch: Batch | None
    """None for a batch of nothing but checks."""
    looked: _Moment
    """The look before it was launched."""
    processed: _Moment | None = None
    """When its result had been processed; None before."""


class Observer:
    """Follows every request from its arrival to its last token."""

    def __init__(self) -> None:
        self.trained = 0.0
        """Seconds of the quanta that have ended so far."""
        self.arrivals = 0
        """Requests seen so far."""
        self._requests: dict[str, _Request] = {}
        self._empty_at = 0.0
        self._trained_when_empty = 0.0
        self._launched = self._ended = 0
        self._looked = self._reported = _Moment(0.0, 0.0, 0, 0)
        """The last look, and the end of the last iteration that was reported."""
        self._running: deque[_Running] = deque(maxlen=MOST_RUNNING)

    def nothing_came(self, now: float) -> None:
        """Note that the scheduler's socket was empty at `now`."""
        self._empty_at, self._trained_when_empty = now, self.trained

    def launched(self) -> None:
        """Note that a quantum has been launched."""
        self._launched += 1

    def ended(self, seconds: float) -> None:
        """Note that a quantum has ended, and its time."""
        self._ended += 1
        self.trained += seconds

    def starts(self, batch: Any) -> None:
        """Note the batch that the scheduler is about to launch."""
        self._running.append(_Running(batch_of(batch) if any(map(_counts, batch.reqs)) else None, self._looked))

    def processed(self, now: float) -> None:
        """Note that the scheduler has processed the result of a batch: the one that was launched first."""
        running = next((running for running in self._running if running.processed is None), None)
        if running is not None:
            running.processed = self._moment(now)

    def look(self, scheduler: Any, now: float) -> tuple[Load, list[Iteration], list[Finished]]:
        """Return the load before the next iteration, the iterations that have ended, and the requests they finished."""
        self._looked = self._moment(now)
        iterations = self._iterations()
        known, self._requests = self._requests, {}
        waiting = [
            self._wait(req, known, scheduler) for req in _unfinished(scheduler.waiting_queue) if not req.output_ids
        ]
        retracted = {req.rid for req in scheduler.waiting_queue if req.output_ids}  # they have their first token
        self._requests |= {rid: known[rid] for rid in retracted & known.keys()}
        streams, finished = [], []
        for req in _in_batches(scheduler):
            if req.finished() and req.rid not in known:
                continue  # reported at an earlier look; SGLang drops it with its next decode
            if not req.output_ids:  # a long prompt, computed in chunks
                waiting.append(self._wait(req, known, scheduler, computed=getattr(req, "extend_end", None)))
                continue
            request = self._began(req, known, now, scheduler)
            if req.finished():
                finished += _finished(req, request, now, self.trained)
                del self._requests[req.rid]
            else:
                context = len(req.origin_input_ids) + len(req.output_ids)
                streams.append(Stream(request.first_token, len(req.output_ids) - 1, context, request.interactive))
        self.nothing_came(now)
        return Load(tuple(streams), tuple(waiting)), iterations, finished

    def _moment(self, now: float) -> _Moment:
        return _Moment(now, self.trained, self._launched, self._ended)

    def _iterations(self) -> list[Iteration]:
        """Return the iterations whose results were processed since the last look; this look ends the last of them."""
        found = []
        while self._running and (end := self._running[0].processed) is not None:
            running = self._running.popleft()
            if not (self._running and self._running[0].processed is not None):
                end = self._looked
            begin = max(running.looked, self._reported)
            self._reported = end
            if running.batch is not None:
                clean = begin.ended == begin.launched == end.launched
                seconds, trained = end.at - begin.at, end.trained - begin.trained
                found.append(Iteration(running.batch, seconds, trained, clean, end.ended == end.launched))
        return found

    def _wait(self, req: Any, known: dict[str, _Request], scheduler: Any, computed: int | None = None) -> Waiting:
        """Follow a request that has no token yet, and of whose prompt the first `computed` tokens are."""
        request = self._follow(req, known, scheduler)
        done = request.cached if computed is None else computed
        left, since = len(req.origin_input_ids) - done, max(0, done - request.cached)
        return Waiting(request.arrival, left, request.interactive, done, since)

    def _began(self, req: Any, known: dict[str, _Request], now: float, scheduler: Any) -> _Request:
        """Follow a request that has tokens, and note the time of its first one."""
        request = self._follow(req, known, scheduler)
        if not request.first_token:
            request.first_token = now
            request.trained_before_first = self.trained - request.trained
            request.trained = self.trained
        return request

    def _follow(self, req: Any, known: dict[str, _Request], scheduler: Any) -> _Request:
        """Return the record of a request; a new one if it was not `known` at the last look."""
        request = known.get(req.rid)
        if request is None:
            self.arrivals += 1
            interactive = req.priority is None or req.priority >= Priority.INTERACTIVE
            cached = _cached(req, getattr(scheduler, "tree_cache", None))
            request = _Request(self._empty_at, self._trained_when_empty, interactive, cached)
        self._requests[req.rid] = request
        return request


def batch_of(batch: Any) -> Batch:
    """Return the features of SGLang's ScheduleBatch; call it before the batch runs, which changes its lists."""
    if batch.forward_mode.is_extend():
        new, cached = batch.extend_lens or [], batch.prefix_lens or []
        return prefill_batch(zip(new, cached, strict=True))
    context = sum(len(req.origin_input_ids) + len(req.output_ids) for req in batch.reqs)
    return Batch("decode", len(batch.reqs), cached_tokens=context)


def _cached(req: Any, tree_cache: Any) -> int:
    """Return how many tokens of a queued request's prompt the engine's radix cache holds on its device.

    SGLang itself asks only when it makes a batch, and its question splits nodes and touches them. This one reads, once
    per request, in one pass over the prompt; a prefix that comes later, or is evicted, is not noticed. 0 for a cache
    of another kind than SGLang's default: then all of the prompt counts as still to be computed.
    """
    core = getattr(tree_cache, "tree_core", None)
    if core is None or len(req.origin_input_ids) < 2:
        return 0
    from sglang.srt.mem_cache.radix_cache import RadixKey

    last = len(req.origin_input_ids) - 1  # the last token is always computed
    key = RadixKey(req.origin_input_ids, req.extra_key, limit=last, cache_salt=req.cache_salt)
    return int(core.match_full_device_prefix(key)[0])


def _in_batches(scheduler: Any) -> Iterable[Any]:
    """Return every request that has been computed on: decoding, just prefilled, or prefilled in chunks."""
    seen: dict[str, Any] = {}
    for batch in (scheduler.running_batch, scheduler.last_batch):
        for req in () if batch is None else filter(_counts, batch.reqs):
            seen[req.rid] = req
    if getattr(scheduler, "chunked_req", None) is not None:
        seen[scheduler.chunked_req.rid] = scheduler.chunked_req
    return seen.values()


def _unfinished(reqs: Iterable[Any]) -> Iterable[Any]:
    return (req for req in reqs if _counts(req) and not req.finished())


def _counts(req: Any) -> bool:
    """Return whether a request is more than a check of the supervisor's."""
    return req.priority is None or req.priority > Priority.CHECK


def _finished(req: Any, request: _Request, now: float, trained: float) -> list[Finished]:
    """Return the latencies of an answered request in a list; an empty list for one that its user aborted."""
    if type(req.finished_reason).__name__ == "FINISH_ABORT":
        return []
    tokens = len(req.output_ids) - 1
    return [
        Finished(
            ttft=request.first_token - request.arrival,
            tpot=(now - request.first_token) / tokens if tokens else None,
            tokens=tokens,
            asked_tokens=len(req.origin_input_ids) - req.cached_tokens,
            trained_before_first=request.trained_before_first,
            trained_after_first=trained - request.trained,
            interactive=request.interactive,
        )
    ]
