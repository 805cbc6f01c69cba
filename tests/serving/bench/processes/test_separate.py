"""The trainer in a process of its own trains the very same adapter as the one inside the engine."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from serving.bench.processes.separate import cotrainer as separate_cotrainer
from serving.bench.systems import (
    UseSystem,
)
from tests.toys.scheduler import MICRO_BATCH, Make
from tests.toys.serving.bench_scheduler import bench_schedulers
from umbel import wire
from umbel.messages import JobState


@pytest.fixture
def make(sockets: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """A toy engine with the benchmark's co-trainer in it."""
    with bench_schedulers(sockets, tiny_llama, monkeypatch) as build:
        yield build


def test_a_separate_process_trains_the_very_same_adapter(make: Make, tiny_llama: Path, tmp_path: Path) -> None:
    scheduler = make()
    scheduler.tell(UseSystem(policy="idle_steps", micro_batch=MICRO_BATCH))
    scheduler.tell(scheduler.train_job())
    assert scheduler.finish().state is JobState.DONE
    other = separate_cotrainer(scheduler.run_dir, tiny_llama)  # takes the socket over
    try:
        order = scheduler.train_job("apart")
        job = other.obey(wire.pack_model(order))
        assert job is not None
        while other.instead_of_sleep():
            pass
        while not job.state.final:
            time.sleep(0.01)
    finally:
        other.commands.socket.close(0)
    apart, inside = (load_file(scheduler.run_dir / f"{name}.safetensors") for name in ("apart", "job"))
    assert apart.keys() == inside.keys()
    for name, weight in inside.items():
        torch.testing.assert_close(apart[name], weight)
