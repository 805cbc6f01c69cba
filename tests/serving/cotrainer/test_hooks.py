"""A failure inside the hooks costs the training and never the engine."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from serving import engine_state
from serving.cotrainer.hooks import Hooks, reserve_memory
from serving.engine_state import EngineState
from serving.trainer_socket import StatusQuery
from tests.toys.scheduler import Make, trainer_settings
from umbel.base.shapes import read_config
from umbel.messages import JobState
from umbel.site.memory import CPU_ROOM, Training, training_bytes


@pytest.mark.parametrize("engine", ["busy", "idle"])
@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyError("weight"), ZeroDivisionError()])
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


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_memory_that_is_used_up_anywhere_in_a_job_fails_it_with_the_remedy(make: Make, error: Exception) -> None:
    scheduler = make()

    def fail(count: int) -> None:
        if scheduler.labels[-1] == "optimizer":
            raise error

    scheduler.on_quantum = fail
    scheduler.tell(scheduler.train_job())
    status = scheduler.finish()
    assert status.state is JobState.FAILED
    assert "[training].memory_mb" in status.error
    assert "optimizer" in scheduler.labels


def test_the_engines_streams_are_known_when_the_lane_is_made(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    found, asked = {"forward_stream": SimpleNamespace(priority=-1)}, list[object]()
    monkeypatch.setattr("serving.cotrainer.hooks.engine_streams", lambda scheduler: asked.append(scheduler) or found)
    scheduler = make()
    assert asked == [scheduler.scheduler]
    assert scheduler.tell(StatusQuery()).streams == {"forward_stream": -1}


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


def kv_cache(model: Path, device: str = "cuda", dtype: torch.dtype = torch.float32, limit: int | None = None) -> Any:
    """Make SGLang's KVCacheConfigurator as far as the hook sees it."""
    arguments = SimpleNamespace(model_path=str(model), max_total_tokens=limit)
    return SimpleNamespace(device=device, server_args=arguments, model_dtype=torch.float32, kv_cache_dtype=dtype)


ROOM = 1 << 30


@pytest.mark.parametrize(("memory_mb", "left"), [(2, ROOM - (2 << 20)), (1025, 0)])
def test_memory_for_training_is_taken_off_the_kv_cache(
    tmp_path: Path, tiny_llama: Path, memory_mb: int, left: int
) -> None:
    hooks = Hooks(tmp_path)
    assert hooks.leave_room(ROOM, kv_cache(tiny_llama)) == ROOM, "an engine that does not train keeps all"
    trainer_settings(memory_mb=memory_mb).write(tmp_path)
    assert hooks.leave_room(ROOM, kv_cache(tiny_llama)) == left


@pytest.mark.parametrize("adapters", [1, 3])
def test_what_is_kept_without_memory_mb_is_what_the_largest_micro_batch_needs(tiny_llama: Path, adapters: int) -> None:
    settings = trainer_settings(adapters=adapters)
    sizes = Training(settings.max_rank, settings.target_modules, 4, settings.micro_batch, settings.seq_len, adapters)
    wanted = training_bytes(read_config(tiny_llama), sizes, settings.micro_batch, recompute=False)
    left, reserve = reserve_memory(ROOM, settings, kv_cache(tiny_llama))
    assert reserve.mb == -(-wanted >> 20)
    assert ROOM - left == reserve.mb << 20 >= wanted


@pytest.mark.parametrize(
    ("dtype", "limit", "missing"),
    [
        (torch.float32, None, 100 << 20 >> 9),
        (torch.float8_e4m3fn, None, 100 << 20 >> 7),
        (torch.float32, 924 << 20 >> 9, 0),
        (torch.float32, 930 << 20 >> 9, 6 << 20 >> 9),
    ],
)
def test_the_tokens_that_are_told_are_those_that_are_missing(
    tmp_path: Path, tiny_llama: Path, dtype: torch.dtype, limit: int | None, missing: int
) -> None:
    """The tiny base has 512 bytes of keys and values per token in fp32."""
    cache = kv_cache(tiny_llama, dtype=dtype, limit=limit)
    assert reserve_memory(ROOM, trainer_settings(memory_mb=100), cache)[1].kv_tokens == missing


def test_a_cpu_has_a_room_of_its_own_with_and_without_training(tiny_llama: Path) -> None:
    cache = kv_cache(tiny_llama, device="cpu")
    assert reserve_memory(99 << 30, None, cache)[0] == CPU_ROOM
    assert reserve_memory(99 << 30, trainer_settings(memory_mb=10), cache)[0] == CPU_ROOM - (10 << 20)
    assert reserve_memory(ROOM, trainer_settings(memory_mb=10), cache)[0] == ROOM - (10 << 20)


def test_training_keeps_to_what_was_kept_for_it_and_tells_it(make: Make, sockets: Path, tiny_llama: Path) -> None:
    scheduler = make()
    hooks = Hooks(sockets)
    hooks.leave_room(ROOM, kv_cache(tiny_llama))
    scheduler.close()
    scheduler.hooks = hooks
    hooks.after_init(None, scheduler.scheduler)
    assert hooks.cotrainer is not None
    status = hooks.cotrainer.status()
    assert status.reserved_mb == hooks.cotrainer.settings.memory_mb is not None
    assert status.kv_tokens_given_up == status.reserved_mb << 20 >> 9 > 0


def test_where_not_even_the_smallest_micro_batch_fits_the_engine_keeps_all_and_says_why(
    make: Make, tiny_llama: Path, sockets: Path
) -> None:
    trainer_settings().write(sockets)
    hooks = Hooks(sockets)
    assert hooks.leave_room(100_000, kv_cache(tiny_llama)) == 100_000
    scheduler = make()
    scheduler.close()
    hooks.after_init(None, scheduler.scheduler)
    assert hooks.cotrainer is not None
    assert hooks.cotrainer.trainer is None
    assert "0 MB are kept for it; set [training].memory_mb" in hooks.cotrainer.unavailable
    hooks.cotrainer.commands.socket.close(0)


def test_a_cache_of_another_release_is_left_as_it_is(tmp_path: Path) -> None:
    trainer_settings().write(tmp_path)
    assert Hooks(tmp_path).leave_room(ROOM, SimpleNamespace()) == ROOM
