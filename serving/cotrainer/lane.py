"""`CpuLane`, `CudaLane`: run quanta at once on a CPU, or on a stream beside the engine's on a CUDA device.

On CUDA a quantum is launched and not waited for. At most two are outstanding, and their events are only queried, so
neither the engine's stream nor the scheduler's thread ever stands still for training. SGLang's streams have the lowest
priority there is, so a training stream cannot be below them; its share of the device is bounded by a green context,
which owns a fixed number of multiprocessors (SMs).
"""

import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

T = TypeVar("T")

OUTSTANDING = 2
"""Quanta launched at a time: one runs, one is behind it, so that the device need not wait for the next hook call."""


class Lane(Protocol):
    """A place in which quanta run one after the other."""

    def run(self, work: Callable[[], T]) -> T:
        """Do the work of one quantum, or launch it; return its result. Call it only when `ready`."""

    def ready(self) -> bool:
        """Return whether another quantum may be launched."""

    def elapsed(self) -> list[float]:
        """Return the seconds of the quanta that have ended since the last call, in the order in which they ran.

        A quantum that raised is left out.
        """


class CpuLane:
    """Runs each quantum at once, on the calling thread."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._elapsed: list[float] = []

    def run(self, work: Callable[[], T]) -> T:
        began = self._clock()
        result = work()
        self._elapsed.append(self._clock() - began)
        return result

    def ready(self) -> bool:
        return True

    def elapsed(self) -> list[float]:
        ended, self._elapsed = self._elapsed, []
        return ended


class Event(Protocol):
    """The methods of `torch.cuda.Event` that are used."""

    def record(self, stream: Any = None) -> None: ...

    def query(self) -> bool: ...

    def elapsed_time(self, end_event: Any) -> float:
        """Return the milliseconds from this event to `end_event`."""


class Device(Protocol):
    """The calls of CUDA that a lane needs; tests replace them."""

    def stream(self, sms: int | None) -> Any:
        """Make a stream; with `sms`, in a green context of about so many multiprocessors."""

    def event(self) -> Event:
        """Make an event that takes the time."""

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Return a context in which work is launched on that stream."""


@dataclass(frozen=True)
class _Span:
    began: Event
    ended: Event


class CudaLane:
    """Launches quanta in order, on a stream of its own for each partition of the device.

    `sms` may be assigned before any quantum: the number of multiprocessors that it may use, None for all. A stream is
    made and kept for each number that occurs; memory that torch caches belongs to a stream, so few should occur.
    """

    def __init__(self, device: torch.device, cuda: Device | None = None, sms: int | None = None) -> None:
        self._cuda = cuda or Cuda(device)
        self.sms = sms
        self._streams: dict[int | None, Any] = {}
        self._current: Any = None
        self._running: deque[_Span] = deque()
        self._free: list[_Span] = []
        self._elapsed: list[float] = []

    def run(self, work: Callable[[], T]) -> T:
        assert self.ready(), "a lane takes no third quantum; ask `ready` first"
        stream = self._stream()
        span = self._free.pop() if self._free else _Span(self._cuda.event(), self._cuda.event())
        with self._cuda.on(stream):
            span.began.record(stream)
            result = work()
            span.ended.record(stream)
        self._running.append(span)
        return result

    def ready(self) -> bool:
        self._collect()
        return len(self._running) < OUTSTANDING

    def elapsed(self) -> list[float]:
        self._collect()
        ended, self._elapsed = self._elapsed, []
        return ended

    def _stream(self) -> Any:
        """Return the stream of the current partition; on a change it waits, on the device, for the last quantum."""
        if self.sms not in self._streams:
            self._streams[self.sms] = self._cuda.stream(self.sms)
        stream = self._streams[self.sms]
        if stream is not self._current:
            if self._running:
                stream.wait_event(self._running[-1].ended)
            self._current = stream
        return stream

    def _collect(self) -> None:
        """Move quanta that have ended from the running ones to the elapsed times."""
        while self._running and self._running[0].ended.query():
            span = self._running.popleft()
            self._elapsed.append(span.began.elapsed_time(span.ended) / 1000)
            self._free.append(span)


class Cuda:
    """The calls of a real CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._contexts: list[Any] = []

    def stream(self, sms: int | None) -> Any:
        if sms is None:
            made: Any = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        else:
            from torch.cuda.green_contexts import GreenContext

            index = torch.cuda.current_device() if self._device.index is None else self._device.index
            context = GreenContext(num_sms=sms, device_id=index)
            self._contexts.append(context)  # its streams end with it
            made = context.Stream()
        made.wait_stream(torch.cuda.current_stream(self._device))  # sees all that was written before
        return made

    def event(self) -> Event:
        made: Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        return made

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream)


class Readback:
    """A copy of a tensor to the host, started now and read later. A tensor of the CPU is not copied."""

    def __init__(self, values: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = values.detach()
        if values.is_cuda:
            self._host = torch.empty_like(self._host, device="cpu", pin_memory=True)
            self._host.copy_(values.detach(), non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def read(self) -> torch.Tensor:
        """Return the values on the host. Waits for the copy alone, which has long ended a step later."""
        if self._event is not None:
            self._event.synchronize()
        return self._host
