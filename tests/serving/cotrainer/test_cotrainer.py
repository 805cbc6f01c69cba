"""By counting, no hook call runs more than one quantum while a request waits; jobs start and end as told."""

from pathlib import Path
from typing import Any

import pytest
import torch

from serving.cotrainer import cotrainer
from serving.trainer_socket import CancelJob, StatusQuery
from tests.toys.scheduler import Make
from tests.toys.serving.served_model import fused
from umbel.messages import JobState

QUANTUM_WORK = [[], ["attention"], ["mlp"], ["head"], ["step"]]
"""Work of torch that one quantum may contain: half a layer forward, head and loss, an optimizer step, or none."""


pytestmark = pytest.mark.usefixtures("patience")


def backwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every backward pass."""
    passes: list[int] = []
    real = torch.autograd.backward
    monkeypatch.setattr(torch.autograd, "backward", lambda *args, **more: (passes.append(1), real(*args, **more))[1])
    return passes


@pytest.mark.parametrize("kind", ["train", "evaluate"])
@pytest.mark.parametrize("waits", ["in the queue", "on the socket"])
def test_no_hook_call_runs_more_than_one_quantum_while_a_request_waits(
    make: Make, kind: str, waits: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = make()
    passes = backwards(monkeypatch)
    scheduler.tell(scheduler.train_job() if kind == "train" else scheduler.evaluate_job())
    scheduler.load(running=2, waiting=1 if waits == "in the queue" else 0)
    if waits == "on the socket":
        scheduler.arrive()
    ran: list[int] = []
    while scheduler.cotrainer.job is not None and scheduler.cotrainer.job.quanta is not None:
        work, passed = len(scheduler.work), len(passes)
        ran.append(len(scheduler.busy()))
        assert scheduler.work[work:] in QUANTUM_WORK
        assert len(passes) - passed <= 1
    assert set(ran) == {0, 1}, "0 only in the call that opens the job's files"
    assert len(ran) == len(scheduler.labels) + 1
    assert scheduler.cotrainer.counts.most_while_waiting == 1
    labels = {
        "train": {
            "load", "step", "attention", "mlp", "head", "mlp_backward", "attention_backward", "optimizer", "copy_out",
            "read_back",
        },
        "evaluate": {"load", "evaluate_attention", "evaluate_mlp", "evaluate_head", "read_back"},
    }  # fmt: skip
    assert set(scheduler.labels) == labels[kind], "each kind of quantum was seen"
    assert scheduler.finish().state is JobState.DONE


@pytest.mark.parametrize("per_iteration", [1, 3, 4])
def test_a_busy_engine_on_which_nobody_waits_runs_what_fits_into_the_budget(make: Make, per_iteration: int) -> None:
    scheduler = make()
    scheduler.grants.per_iteration = per_iteration
    scheduler.tell(scheduler.train_job())
    scheduler.load(running=2)
    scheduler.open_files()
    assert [len(scheduler.busy()) for _ in range(5)] == [per_iteration] * 5
    assert scheduler.cotrainer.counts.most_while_waiting == 0


@pytest.mark.parametrize("known", [True, False])
def test_none_per_iteration_trains_only_when_idle(make: Make, known: bool) -> None:
    scheduler = make()
    scheduler.grants.per_iteration = 0
    if not known:  # no such quantum was ever timed
        scheduler.cotrainer.predictor.quantum_high = lambda quantum: 0.0  # type: ignore[method-assign]
    scheduler.tell(scheduler.train_job())
    scheduler.load(running=1)
    assert [scheduler.busy() for _ in range(3)] == [[], [], []]
    scheduler.load()
    assert scheduler.idle() != []


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_request_that_arrives_between_quanta_ends_the_hook_call(make: Make, at: int) -> None:
    scheduler = make()
    scheduler.tell(scheduler.train_job())
    scheduler.load(running=2)
    scheduler.on_quantum = lambda count: scheduler.arrive() if count == at else None
    assert len(scheduler.busy()) == at
    assert [len(scheduler.busy()) for _ in range(3)] == [1, 1, 1], "it still lies there"
    scheduler.take()
    assert len(scheduler.busy()) == 4
    assert scheduler.cotrainer.counts.most_while_waiting == 1


@pytest.mark.parametrize("at", [1, 2, 7])
def test_an_idle_engine_trains_until_a_request_arrives_and_not_a_quantum_longer(make: Make, at: int) -> None:
    scheduler = make()
    scheduler.tell(scheduler.train_job())
    scheduler.on_quantum = lambda count: scheduler.arrive() if count == at else None
    assert len(scheduler.idle()) == at
    assert scheduler.idle() == [], "it still lies there"
    assert scheduler.sleeps == 0, "the scheduler goes on at once"
    scheduler.take()
    scheduler.on_quantum = lambda count: None
    assert len(scheduler.idle()) > 1


def test_an_idle_engine_that_must_rest_wakes_for_a_request(make: Make) -> None:
    scheduler = make()
    scheduler.tell(scheduler.train_job())
    scheduler.grants.rest_s = 1000.0
    poller = Poller(scheduler.cotrainer.idle_poller)
    scheduler.cotrainer.idle_poller = poller
    scheduler.arrive()
    assert scheduler.idle() == []
    assert len(poller.timeouts_ms) == 1
    assert scheduler.sleeps == 0


def test_a_long_rest_does_not_hold_up_the_engines_housekeeping(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cotrainer, "HOUSEKEEPING_S", 0.3)
    scheduler = make()
    scheduler.tell(scheduler.train_job())
    scheduler.grants.rest_s = 1000.0
    poller = Poller(scheduler.cotrainer.idle_poller, longest_ms=50)
    scheduler.cotrainer.idle_poller = poller
    assert scheduler.idle() == []
    assert max(poller.timeouts_ms) <= 300


class Poller:
    """The idle engine's poller, which notes how long it was to wait."""

    def __init__(self, poller: Any, longest_ms: float = 60_000) -> None:
        self.poller, self.longest_ms = poller, longest_ms
        self.timeouts_ms: list[float] = []

    def poll(self, timeout_ms: float) -> Any:
        self.timeouts_ms.append(timeout_ms)
        return self.poller.poll(min(timeout_ms, self.longest_ms))


def test_an_engine_without_a_job_sleeps_as_always(make: Make) -> None:
    scheduler = make()
    assert scheduler.idle() == []
    assert scheduler.sleeps == 1
    scheduler.load(running=1)
    assert scheduler.busy() == []
    scheduler.tell(scheduler.train_job())
    assert scheduler.finish().state is JobState.DONE
    assert scheduler.idle() == []
    assert scheduler.sleeps > 1


def test_a_cancelled_job_runs_no_further_and_another_is_left_alone(make: Make) -> None:
    scheduler = make()
    scheduler.tell(scheduler.train_job())
    scheduler.load(running=1)
    scheduler.busy()
    assert scheduler.tell(CancelJob(id="another")).job is None
    assert scheduler.tell(StatusQuery()).state is JobState.RUNNING
    assert scheduler.tell(CancelJob(id="job")).state is JobState.CANCELLED
    assert (scheduler.busy(), scheduler.idle()) == ([], [])
    assert scheduler.tell(CancelJob(id="job")).state is JobState.CANCELLED, "twice is no change"
    assert not (scheduler.run_dir / "job.safetensors").exists()
    scheduler.tell(scheduler.train_job("next"))
    assert scheduler.finish().state is JobState.DONE


def test_starting_the_same_job_again_is_no_change(make: Make) -> None:
    scheduler = make()
    order = scheduler.train_job()
    scheduler.tell(order)
    job = scheduler.cotrainer.job
    scheduler.load(running=1)
    scheduler.busy()
    assert scheduler.tell(order).state is JobState.RUNNING
    assert scheduler.cotrainer.job is job
    assert scheduler.finish().job == "job"
    assert scheduler.tell(order).state is JobState.DONE, "also when it has ended"


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
