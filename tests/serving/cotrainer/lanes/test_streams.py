"""CUDA streams: the engine's go before training's, and training's is none of the engine's."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from serving.cotrainer.lanes.streams import (
    DRAWS,
    ENGINE_PRIORITY,
    TRAINING_PRIORITY,
    EngineStreams,
    Streams,
    engine_streams,
    training_stream,
)
from umbel.errors import TrainingError


@dataclass
class ToyStream:
    cuda_stream: int
    priority: int
    waited_for: list["ToyStream"] = field(default_factory=list)

    def wait_stream(self, other: "ToyStream") -> None:
        self.waited_for.append(other)


class ToyCuda:
    """Hands streams out of a pool in turn, one pool for each priority, as torch does; the handles are distinct."""

    def __init__(self, pool: int = 32) -> None:
        self.pool = pool
        self.drawn: dict[int, int] = {}
        self.current: list[ToyStream] = []

    def Stream(self, *, priority: int = 0) -> ToyStream:
        at = self.drawn.get(priority, 0)
        self.drawn[priority] = at + 1
        return ToyStream(1000 * (1 - priority) + at % self.pool, priority)

    @contextmanager
    def stream(self, stream: ToyStream) -> Iterator[None]:
        self.current.append(stream)
        yield
        self.current.pop()


def runner(device: str = "cuda") -> Any:
    return SimpleNamespace(device=device, forward_stream=ToyStream(7, 0))


def test_the_engines_streams_are_drawn_before_training_can_be_there() -> None:
    cuda = ToyCuda()
    hooks, made = EngineStreams(cuda), runner()
    assert hooks.before_capture() is None, "nothing is known of the device yet"
    hooks.before_initialize(made)
    _, captured = hooks.before_capture(stream=ToyStream(8, 0)) or ((), {})
    assert made.forward_stream.priority == captured["stream"].priority == ENGINE_PRIORITY
    assert made.forward_stream.cuda_stream != captured["stream"].cuda_stream
    assert hooks.before_capture() == ((), captured), "one stream for all graphs, since each would have its own memory"


def test_two_runners_of_one_process_have_streams_of_their_own() -> None:
    hooks, target, draft = EngineStreams(ToyCuda()), runner(), runner("cuda:0")
    hooks.before_initialize(target)
    captured = hooks.before_capture()
    hooks.before_initialize(draft)
    assert target.forward_stream.cuda_stream != draft.forward_stream.cuda_stream
    assert hooks.before_capture() == captured


def test_the_event_loop_runs_on_a_stream_that_goes_first_and_sees_what_was_written() -> None:
    cuda = ToyCuda()
    hooks, made = EngineStreams(cuda), runner()
    hooks.before_initialize(made)
    before = ToyStream(9, 0)
    scheduler = SimpleNamespace(device="cuda", schedule_stream=before)
    current = hooks.around_event_loop(lambda found: (found, cuda.current[-1]), scheduler)
    assert current == (scheduler, scheduler.schedule_stream)
    assert scheduler.schedule_stream.priority == ENGINE_PRIORITY
    assert scheduler.schedule_stream.waited_for == [before]
    taken = {made.forward_stream.cuda_stream, (hooks.before_capture() or ((), {}))[1]["stream"].cuda_stream}
    assert scheduler.schedule_stream.cuda_stream not in taken


def test_on_a_cpu_nothing_is_changed() -> None:
    cuda = ToyCuda()
    hooks, made = EngineStreams(cuda), runner("cpu")
    before, scheduler = made.forward_stream, SimpleNamespace(device="cpu", schedule_stream=None)
    hooks.before_initialize(made)
    assert made.forward_stream is before
    assert hooks.before_capture(stream=before) is None
    assert hooks.around_event_loop(lambda found: (found, list(cuda.current)), scheduler) == (scheduler, [])
    assert cuda.drawn == {}


def test_streams_are_found_by_name_on_the_scheduler_and_its_runner() -> None:
    forward, copy = ToyStream(1, -1), ToyStream(2, 0)
    made = SimpleNamespace(device="cuda", forward_stream=forward, model=object())
    scheduler = SimpleNamespace(
        tp_worker=SimpleNamespace(model_runner=made), forward_stream=forward, copy_stream=copy,
        schedule_stream=ToyStream(3, 0), copy_stream_ctx=object(), stream_interval=1,
    )  # fmt: skip
    assert engine_streams(scheduler) == {"forward_stream": forward, "copy_stream": copy}


def test_a_stream_of_the_engines_is_never_trainings() -> None:
    cuda = ToyCuda()
    streams: Streams = {"forward_stream": ToyStream(1, -1), "copy_stream": cuda.Stream(), "plan_stream": cuda.Stream()}
    handles = {stream.cuda_stream for stream in streams.values()}
    cuda.drawn.clear()  # torch's pool has come round: the next draws are the engine's own
    made = training_stream(cuda.Stream, streams)
    assert made.cuda_stream not in handles
    assert (streams["training"], made.priority) == (made, TRAINING_PRIORITY)
    assert cuda.drawn == {0: 3}


def test_where_every_stream_is_the_engines_training_is_refused() -> None:
    cuda = ToyCuda(pool=1)
    streams: Streams = {"forward_stream": ToyStream(1, -1), "copy_stream": cuda.Stream()}
    cuda.drawn.clear()
    with pytest.raises(TrainingError, match=f"each of {DRAWS} CUDA streams .* 2 that the engine uses"):
        training_stream(cuda.Stream, streams)
    assert cuda.drawn == {0: DRAWS}


@pytest.mark.parametrize(
    ("streams", "why"),
    [({}, "the engine has none"), ({"forward_stream": ToyStream(1, 0)}, "its priority is 0")],
    ids=["elsewhere", "no hook"],
)
def test_an_engine_that_does_not_go_first_is_not_trained_beside(streams: Streams, why: str) -> None:
    with pytest.raises(TrainingError, match=f"forward_stream would not go before training .*{why}"):
        training_stream(ToyCuda().Stream, streams)
    assert "training" not in streams
