"""`Observer`: reads SGLang's scheduler and describes its requests in the governor's terms. It changes nothing.

Every look happens on the scheduler's thread before an iteration. A request is taken to arrive at the last moment at
which it was certainly not there: SGLang notes it only when it reads its socket, which may be a quantum later. The
supervisor's checks (`CHECK_PRIORITY`) are not seen at all: nobody waits for them, and nothing is learnt from them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from serving.aliases import CHECK_PRIORITY, CLASSES
from serving.cotrainer.governor import Finished, Load, Stream, Waiting
from serving.cotrainer.predictor import Batch


@dataclass
class _Request:
    """A request that is not yet answered. Times are seconds on the co-trainer's clock."""

    arrival: float
    trained: float
    """Seconds of training until its arrival; once it has a first token, until that."""
    interactive: bool
    first_token: float = 0.0
    trained_before_first: float = 0.0


@dataclass(frozen=True)
class Iteration:
    """An iteration that has ended; `seconds` includes the `trained` seconds of quanta that ran before it."""

    batch: Batch
    seconds: float
    trained: float


class Observer:
    """Follows every request from its arrival to its last token."""

    def __init__(self) -> None:
        self.trained = 0.0
        """Seconds of quanta so far; the co-trainer adds to it."""
        self.arrivals = 0
        """Requests seen so far."""
        self._requests: dict[str, _Request] = {}
        self._empty_at = 0.0
        self._trained_when_empty = 0.0
        self._looked_at = 0.0
        self._trained_at_look = 0.0
        self._batch: Batch | None = None

    def nothing_came(self, now: float) -> None:
        """Note that the scheduler's socket was empty at `now`."""
        self._empty_at, self._trained_when_empty = now, self.trained

    def starts(self, batch: Any) -> None:
        """Note the batch that the scheduler is about to run."""
        self._batch = batch_of(batch) if any(map(_counts, batch.reqs)) else None

    def look(self, scheduler: Any, now: float) -> tuple[Load, Iteration | None, list[Finished]]:
        """Return the load before the next iteration, the iteration that has ended, and the requests it finished."""
        iteration = None
        if self._batch is not None:
            trained = self.trained - self._trained_at_look
            iteration = Iteration(self._batch, now - self._looked_at, trained)
        self._batch, self._looked_at, self._trained_at_look = None, now, self.trained
        known, self._requests = self._requests, {}
        waiting = [
            self._wait(req, known)
            for req in _unfinished(scheduler.waiting_queue)
            if not req.output_ids  # one that was retracted already has its first token
        ]
        streams, finished = [], []
        for req in _in_batches(scheduler):
            if req.finished() and req.rid not in known:
                continue  # reported at an earlier look; SGLang drops it with its next decode
            if not req.output_ids:  # a long prompt, computed in chunks
                waiting.append(self._wait(req, known))
                continue
            request = self._began(req, known, now)
            if req.finished():
                finished += _finished(req, request, now, self.trained)
                del self._requests[req.rid]
            else:
                context = len(req.origin_input_ids) + len(req.output_ids)
                streams.append(Stream(request.first_token, len(req.output_ids) - 1, context, request.interactive))
        self.nothing_came(now)
        return Load(tuple(streams), tuple(waiting)), iteration, finished

    def _wait(self, req: Any, known: dict[str, _Request]) -> Waiting:
        """Follow a request that has no token yet."""
        request = self._follow(req, known)
        return Waiting(request.arrival, len(req.origin_input_ids), request.interactive)

    def _began(self, req: Any, known: dict[str, _Request], now: float) -> _Request:
        """Follow a request that has tokens, and note the time of its first one."""
        request = self._follow(req, known)
        if not request.first_token:
            request.first_token = now
            request.trained_before_first = self.trained - request.trained
            request.trained = self.trained
        return request

    def _follow(self, req: Any, known: dict[str, _Request]) -> _Request:
        """Return the record of a request; a new one if it was not `known` at the last look."""
        request = known.get(req.rid)
        if request is None:
            self.arrivals += 1
            interactive = req.priority is None or req.priority > CLASSES["batch"]
            request = _Request(self._empty_at, self._trained_when_empty, interactive)
        self._requests[req.rid] = request
        return request


def batch_of(batch: Any) -> Batch:
    """Return the features of SGLang's ScheduleBatch; call it before the batch runs, which changes its lists."""
    if batch.forward_mode.is_extend():
        new, cached = batch.extend_lens or [], batch.prefix_lens or []
        attended = sum(count * (count // 2 + before) for count, before in zip(new, cached, strict=True))
        return Batch("prefill", len(batch.reqs), sum(new), attended, sum(cached))
    context = sum(len(req.origin_input_ids) + len(req.output_ids) for req in batch.reqs)
    return Batch("decode", len(batch.reqs), cached_tokens=context)


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
    return req.priority is None or req.priority > CHECK_PRIORITY


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
            trained_before_first=request.trained_before_first,
            trained_after_first=trained - request.trained,
            interactive=request.interactive,
        )
    ]
