"""`Cuda` draws training's stream from torch's pool, beside the engine's. Toys stand for torch's streams."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from serving.cotrainer.lanes.cuda import Cuda
from serving.cotrainer.lanes.streams import Streams


@dataclass
class ToyStream:
    device: Any
    priority: int
    cuda_stream: int = 0
    waited_for: list[object] = field(default_factory=list)

    def wait_stream(self, other: object) -> None:
        self.waited_for.append(other)


def test_the_stream_is_none_of_the_engines_and_sees_what_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    handles, current = iter((4, 5, 6)), object()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: ToyStream(device, priority, next(handles)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    device = torch.device("cuda", 1)
    streams: Streams = {"forward_stream": ToyStream(device, -1, 3), "copy_stream": ToyStream(device, 0, 4)}
    arena: Any = object()
    made = Cuda(device, streams, arena).stream()
    assert (made.device, made.priority, made.cuda_stream, made.waited_for) == (device, 0, 5, [current])
    assert streams["training"] is made
