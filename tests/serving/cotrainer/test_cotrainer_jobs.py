"""Jobs of the co-trainer: what they bring, how they end, and that none of it ever reaches the engine."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from serving.cotrainer.hooks import Hooks
from serving.cotrainer.lora import Factors
from serving.scores import Scores
from serving.trainer_socket import CancelJob, StatusQuery
from tests.toys.scheduler import RANK, ToyScheduler, fused
from umbel import peft_dir, wire
from umbel.base import LINEARS, linear_shapes
from umbel.messages import JobState
from umbel.token_file import TokenFile

Make = Callable[..., ToyScheduler]


@pytest.fixture
def make(sockets: Path, tiny_llama: Path) -> Iterator[Make]:
    made: list[ToyScheduler] = []

    def build(**settings: Any) -> ToyScheduler:
        made.append(ToyScheduler(sockets, tiny_llama, **settings))
        return made[-1]

    yield build
    for scheduler in made:
        scheduler.close()


def test_the_update_that_is_written_is_what_was_trained(make: Make, tiny_llama: Path) -> None:
    scheduler = make()
    order = scheduler.train_job()
    assert scheduler.tell(order).state is JobState.RUNNING
    status = scheduler.finish()
    assert (status.job, status.state, status.error) == ("job", JobState.DONE, "")
    assert (status.steps, status.examples) == (2, 8)
    assert status.loss_tokens > 0
    assert 0 < status.share <= 1
    update = peft_dir.decode(Path(order.output).read_bytes())
    peft_dir.validate(update, linear_shapes(tiny_llama, LINEARS), rank=RANK, max_rank=RANK)
    trained: Factors = {}
    for _ in scheduler.trainer.copy_out(RANK, trained, torch.float32):
        pass
    assert len(update) == 2 * len(trained)
    for module, pair in trained.items():
        for factor, weight in zip("AB", pair, strict=True):
            np.testing.assert_array_equal(update[peft_dir.key(module, factor)], weight.numpy())
    assert peft_dir.encode(update) != Path(order.parent).read_bytes(), "it has learned something"


def test_the_update_has_the_dtype_that_is_served(make: Make, tiny_llama: Path) -> None:
    scheduler = make(served=fused(tiny_llama, torch.bfloat16))
    order = scheduler.train_job()
    scheduler.tell(order)
    assert scheduler.finish().state is JobState.DONE
    assert {str(array.dtype) for array in peft_dir.decode(Path(order.output).read_bytes()).values()} == {"bfloat16"}


@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("output", [True, False])
def test_an_evaluation_is_the_trainers_and_only_its_file_has_single_examples(
    make: Make, adapter: bool, output: bool
) -> None:
    scheduler = make()
    file = scheduler.run_dir / "scores.npy"
    order = scheduler.evaluate_job().model_copy(update={} if adapter else {"adapter": None})
    scheduler.tell(order.model_copy(update={"output": str(file)} if output else {}))
    status = scheduler.finish()
    expected: list[Scores] = []
    source = None
    if adapter:
        tensors = peft_dir.decode(Path(str(order.adapter)).read_bytes())
        pairs = {name: (torch.tensor(a), torch.tensor(b)) for name, (a, b) in peft_dir.factors(tensors).items()}
        source = pairs.__getitem__
    for _ in scheduler.trainer.evaluate(source, TokenFile.open(Path(order.data)), expected):
        pass
    assert (status.state, status.evaluation) == (JobState.DONE, expected[0].sums)
    assert file.exists() is output
    if output:
        read = Scores.read(file)
        assert (read.loss.tolist(), read.tokens.tolist()) == (expected[0].loss.tolist(), expected[0].tokens.tolist())
        assert read.exact.tolist() == expected[0].exact.tolist()


def test_a_cancelled_job_runs_no_further_and_another_is_left_alone(make: Make) -> None:
    scheduler = make()
    scheduler.tell(scheduler.train_job())
    scheduler.load(running=1)
    scheduler.busy()
    assert scheduler.tell(CancelJob(id="another")).state is JobState.RUNNING
    assert scheduler.tell(CancelJob(id="job")).state is JobState.CANCELLED
    assert (scheduler.busy(), scheduler.idle()) == ([], [])
    assert scheduler.tell(CancelJob(id="job")).state is JobState.CANCELLED, "twice is no change"
    assert not (scheduler.run_dir / "job.safetensors").exists()
    scheduler.tell(scheduler.train_job("next"))
    assert scheduler.finish().state is JobState.DONE


def test_starting_the_same_job_again_is_no_change_and_another_is_refused(make: Make) -> None:
    scheduler = make()
    order = scheduler.train_job()
    scheduler.tell(order)
    job = scheduler.cotrainer.job
    scheduler.load(running=1)
    scheduler.busy()
    assert scheduler.tell(order).state is JobState.RUNNING
    refused = scheduler.tell(scheduler.train_job("other"))
    assert (refused.job, refused.error) == (None, "busy with job job")
    assert scheduler.cotrainer.job is job
    assert scheduler.finish().job == "job"
    assert scheduler.tell(order).state is JobState.DONE, "also when it has ended"


BAD: list[tuple[str, dict[str, str], str]] = [
    ("no data", {"data": "/nowhere/train.npy"}, "/nowhere/train.npy: not a token file"),
    ("no parent", {"parent": "/nowhere/parent.safetensors"}, "/nowhere/parent.safetensors"),
    ("no place for the update", {"output": "/nowhere/update.safetensors"}, "/nowhere/update.safetensors"),
]


@pytest.mark.parametrize("engine", ["busy", "idle"])
@pytest.mark.parametrize(("changes", "reason"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_a_job_that_cannot_go_on_fails_with_its_reason_and_the_next_one_runs(
    make: Make, engine: str, changes: dict[str, str], reason: str
) -> None:
    scheduler = make()
    scheduler.tell(scheduler.train_job("bad", **changes))
    if engine == "busy":
        scheduler.load(running=1)
        while scheduler.cotrainer.job is not None and scheduler.cotrainer.job.quanta is not None:
            scheduler.busy()
    status = scheduler.finish()
    assert status.state is JobState.FAILED
    assert reason in status.error
    scheduler.tell(scheduler.train_job("good"))
    assert scheduler.finish().state is JobState.DONE


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


@pytest.mark.parametrize(
    "message",
    [b"", b"junk", wire.pack("TrainJob", {"id": "x"}), wire.pack("Reboot", {}), wire.pack("CancelJob", {}),
     wire.pack("StatusQuery", {"more": 1})],
)  # fmt: skip
def test_a_message_that_is_not_understood_is_answered_and_changes_nothing(make: Make, message: bytes) -> None:
    scheduler = make()
    scheduler.tell(scheduler.train_job())
    answer = scheduler.tell(message)
    assert answer.error
    assert answer.job is None
    assert scheduler.tell(StatusQuery()).state is JobState.RUNNING
    assert scheduler.finish().state is JobState.DONE


def test_a_message_of_several_frames_changes_nothing(make: Make) -> None:
    scheduler = make()
    scheduler.tell(scheduler.train_job())
    scheduler._daemon.send_multipart([b"one", b"two"])
    assert scheduler.cotrainer.socket.poll(20_000)
    scheduler.idle()
    assert scheduler.finish().state is JobState.DONE


def test_where_there_is_no_cotraining_every_start_is_refused_with_the_reason(make: Make, tiny_llama: Path) -> None:
    served = fused(tiny_llama)
    del served.get_submodule("model.norm").weight
    scheduler = make(served=served)
    for order in (scheduler.train_job("a"), scheduler.evaluate_job("b"), StatusQuery(), scheduler.train_job("c")):
        status = scheduler.tell(order)
        assert (status.job, status.frozen_tensors) == (None, 0)
        assert status.error.startswith("the co-trainer could not be built: model.norm.weight: the engine has no such")
    scheduler.load(running=1)
    assert scheduler.busy() == []
    assert (scheduler.idle(), scheduler.sleeps) == ([], 1), "the engine serves, and sleeps, as if there were none"


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


def test_settings_that_cannot_be_read_do_not_stop_the_engine(tmp_path: Path) -> None:
    (tmp_path / "trainer.json").write_text("{}")
    Hooks(tmp_path).after_init(None, SimpleNamespace())
