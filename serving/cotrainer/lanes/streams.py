"""CUDA streams in SGLang's scheduler: the engine's go before training's, and training's is none of the engine's.

SGLang draws all of its streams at priority 0, the lowest there is, and torch hands streams out of a pool of 32 in turn.
So a stream for training would have the engine's priority, and could be one of the engine's.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar, runtime_checkable

from umbel.errors import TrainingError

ENGINE_PRIORITY, TRAINING_PRIORITY = -1, 0
"""Priorities of the engine's streams and of training's: a lower number goes first."""
FORWARD, SCHEDULE = "forward_stream", "schedule_stream"
"""Names, in SGLang, of the streams on which batches are computed and prepared."""
TRAINING = "training"
DRAWS = 65
"""Streams drawn until one is new; torch's pool of each priority has 32."""


@runtime_checkable
class Stream(Protocol):
    """The attributes of `torch.cuda.Stream` that are read."""

    @property
    def cuda_stream(self) -> int:
        """Handle of the stream on the device; two objects may have the same."""

    @property
    def priority(self) -> int: ...


class Cuda(Protocol):
    """The calls of `torch.cuda` that are made."""

    def Stream(self, *, priority: int) -> Any:
        """Draw a stream from the pool of a priority."""

    def stream(self, stream: Any) -> AbstractContextManager[Any]:
        """Return a context in which work is launched on that stream."""


S = TypeVar("S", bound=Stream)
Streams = dict[str, Stream]
"""Name → stream; training's own is `TRAINING`."""


class EngineStreams:
    """Hooks of SGLang that draw the engine's streams at `ENGINE_PRIORITY`; `serving.plugin` registers them.

    Three of them compute: `forward_stream`; the stream on which graphs are captured, since a kernel in a graph keeps
    the priority of that stream (torch instantiates graphs with cudaGraphInstantiateFlagUseNodePriority); and
    `schedule_stream`, whose small kernels each forward waits for. On another device than CUDA nothing is changed.
    """

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._drawn: list[Stream] = []
        self._capture: Stream | None = None

    def before_initialize(self, runner: Any) -> None:
        """BEFORE `ModelRunner.initialize`, which loads the model and hands `forward_stream` on to its parts."""
        if _is_cuda(runner):
            runner.forward_stream = self._draw()
            self._capture = self._capture or self._draw()

    def before_capture(self, *args: Any, **kwargs: Any) -> tuple[tuple[()], dict[str, Any]] | None:
        """BEFORE `parallel_state.graph_capture(stream=None)`: capture every graph on one stream of ours."""
        return None if self._capture is None else ((), {"stream": self._capture})

    def around_event_loop(self, loop: Callable[[Any], Any], scheduler: Any) -> Any:
        """AROUND `scheduler.dispatch_event_loop`, which never returns: run it on another `schedule_stream`."""
        if not _is_cuda(scheduler):
            return loop(scheduler)
        stream: Any = self._draw()
        stream.wait_stream(scheduler.schedule_stream)
        scheduler.schedule_stream = stream
        with self._cuda.stream(stream):
            return loop(scheduler)

    def _draw(self) -> Stream:
        made: Stream = _new(lambda: self._cuda.Stream(priority=ENGINE_PRIORITY), self._drawn)
        self._drawn.append(made)
        return made


def engine_streams(scheduler: Any) -> Streams:
    """Return the CUDA streams of SGLang's Scheduler and of its model runner; none on another device.

    `schedule_stream` is left out: `EngineStreams` draws another one when the loop begins.
    """
    return {
        name: value
        for owner in (scheduler.tp_worker.model_runner, scheduler)
        for name, value in vars(owner).items()
        if "stream" in name and name != SCHEDULE and isinstance(value, Stream)
    }


def training_stream(draw: Callable[[], S], streams: Streams) -> S:
    """Return a stream that `draw` makes and that is none of the engine's `streams`; note it there as `TRAINING`.

    Raises TrainingError if torch has no other one, or if the engine's `forward_stream` does not go before it.
    """
    made = _new(draw, streams.values())
    forward = streams.get(FORWARD)
    if forward is None or forward.priority >= made.priority:
        found = "the engine has none" if forward is None else f"its priority is {forward.priority}"
        raise TrainingError(
            f"the engine's {FORWARD} would not go before training ({found}; training's priority is {made.priority}); "
            "this release of SGLang makes its streams elsewhere than umbel looks"
        )
    streams[TRAINING] = made
    return made


def _new(draw: Callable[[], S], others: Iterable[Stream]) -> S:
    """Draw until a stream is none of the others. Raises TrainingError after `DRAWS`."""
    taken = {other.cuda_stream for other in others}
    for _ in range(DRAWS):
        made = draw()
        if made.cuda_stream not in taken:
            return made
    raise TrainingError(f"each of {DRAWS} CUDA streams that torch made is one of the {len(taken)} that the engine uses")


def _is_cuda(owner: Any) -> bool:
    """Return whether a Scheduler or ModelRunner computes on CUDA; `device` is a text such as `cuda`."""
    return str(owner.device).partition(":")[0] == "cuda"
