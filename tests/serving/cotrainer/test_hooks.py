"""A failure inside the hooks costs the training and never the engine."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from serving import engine_state
from serving.cotrainer.hooks import Hooks, reserve_memory
from serving.engine_state import EngineState
from serving.trainer_socket import StatusQuery
from tests.toys.scheduler import Make, schedulers, trainer_settings
from umbel.messages import JobState


@pytest.fixture
def make(sockets: Path, tiny_llama: Path) -> Iterator[Make]:
    with schedulers(sockets, tiny_llama) as build:
        yield build


@pytest.mark.parametrize("engine", ["busy", "idle"])
@pytest.mark.parametrize(
    "error", [RuntimeError("out of memory"), KeyError("weight"), ZeroDivisionError(), MemoryError()]
)
def test_any_exception_within_a_quantum_costs_the_job_and_nothing_else(
    make: Make, engine: str, error: Exception
) -> None:
    scheduler = make()

    def fail(count: int) -> None:
        if count == 5:
            raise error

    scheduler.on_quantum = fail
    scheduler.tell(scheduler.train_job("bad"))
    scheduler.load(running=int(engine == "busy"))
    for _ in range(3):
        scheduler.busy() if engine == "busy" else scheduler.idle()
    status = scheduler.finish()
    assert (status.job, status.state) == ("bad", JobState.FAILED)
    assert status.error == (str(error) or type(error).__name__)
    scheduler.tell(scheduler.train_job("good"))
    assert scheduler.finish().state is JobState.DONE


def test_an_engine_without_settings_only_serves(tmp_path: Path) -> None:
    hooks, slept = Hooks(tmp_path), list[object]()
    scheduler = SimpleNamespace()
    hooks.after_init(None, scheduler)
    hooks.before_iteration(scheduler)
    hooks.around_sleep(slept.append, scheduler)
    assert hooks.cotrainer is None
    assert slept == [scheduler]


def test_hooks_survive_a_scheduler_of_another_release(make: Make, sockets: Path) -> None:
    """Whatever attribute SGLang renames, requests are still scheduled and the idle engine still sleeps."""
    scheduler, slept = make(), list[object]()
    scheduler.tell(scheduler.train_job())
    strange: Any = SimpleNamespace()
    scheduler.hooks.before_iteration(strange)
    assert scheduler.tell(StatusQuery()).state is JobState.FAILED
    other = Hooks(sockets)
    other.after_init(None, strange)
    other.before_iteration(strange)
    other.around_sleep(slept.append, strange)
    assert slept == [strange]


def test_batches_are_counted_whatever_becomes_of_the_training(tmp_path: Path) -> None:
    state = EngineState.create(tmp_path / engine_state.FILE)
    hooks, strange = Hooks(tmp_path), SimpleNamespace()
    for number in (1, 2):
        hooks.before_batch(strange, strange)
        assert state.batches == number


def test_settings_that_cannot_be_read_do_not_stop_the_engine(tmp_path: Path) -> None:
    (tmp_path / "trainer.json").write_text("{}")
    Hooks(tmp_path).after_init(None, SimpleNamespace())


@pytest.mark.parametrize(("memory_mb", "left"), [(None, 5 << 20), (2, 3 << 20), (9, 0)])
def test_memory_for_training_is_taken_off_the_kv_cache(tmp_path: Path, memory_mb: int | None, left: int) -> None:
    assert reserve_memory(5 << 20, tmp_path) == 5 << 20, "an engine that does not train keeps all"
    trainer_settings(memory_mb=memory_mb).write(tmp_path)
    assert reserve_memory(5 << 20, tmp_path) == left
