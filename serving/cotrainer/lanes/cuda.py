"""`Cuda`: the calls of a CUDA device that a `DeviceLane` makes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from serving.cotrainer.lanes.device_lane import Event
from serving.cotrainer.lanes.streams import TRAINING_PRIORITY, Streams, training_stream
from serving.cotrainer.memory import Arena


class Cuda:
    """A real CUDA device; `streams` are the engine's on it, and training's joins them."""

    def __init__(self, device: torch.device, streams: Streams, arena: Arena) -> None:
        self._device, self._streams, self._arena = device, streams, arena

    def stream(self) -> Any:
        made: Any = training_stream(self._draw, self._streams)
        made.wait_stream(torch.cuda.current_stream(self._device))  # sees all that was written before
        return made

    def _draw(self) -> Any:
        return torch.cuda.Stream(self._device, priority=TRAINING_PRIORITY)  # type: ignore[no-untyped-call]

    def event(self) -> Event:
        made: Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        return made

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        with torch.cuda.stream(stream), self._arena.using():
            yield
