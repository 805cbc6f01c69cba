"""Each compared system trains when its policy says so, in pieces of its size, switched in a running engine."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serving.bench.baselines import Closed
from serving.bench.metrics import HOOKS, JOBLESS
from serving.bench.systems import UseSystem, governor_of
from serving.cotrainer.cotrainer import CoTrainer
from serving.cotrainer.lanes.device_lane import DeviceLane
from serving.cotrainer.lanes.lagging import LaggingDevice
from serving.cotrainer.predictor import Predictor
from serving.cotrainer.slo import Slo
from serving.trainer_socket import StatusQuery
from tests.toys.scheduler import Make, ToyScheduler
from tests.toys.serving.bench_scheduler import bench_schedulers
from umbel.messages import JobState

PATIENCE_S = 60.0


@pytest.mark.parametrize("kind", ["rest", "unpaced"])
def test_who_trains_elsewhere_gets_nothing_of_the_engines_loop(kind: Any) -> None:
    assert type(governor_of(UseSystem(policy=kind), Slo.usual(0.1, 0.02), Predictor())) is Closed


@pytest.fixture
def make(sockets: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """A toy engine with the benchmark's co-trainer in it."""
    with bench_schedulers(sockets, tiny_llama, monkeypatch) as build:
        yield build


def steps(scheduler: ToyScheduler) -> int:
    job = scheduler.cotrainer.job
    assert job is not None
    return job.progress.steps


def test_a_stopped_world_is_stopped_for_whole_steps_and_once(make: Make) -> None:
    scheduler = make()
    scheduler.tell(UseSystem(policy="stop_the_world", period_s=1e6, steps=2))
    plan = scheduler.train_job().plan.model_copy(update={"steps": 5})
    scheduler.tell(scheduler.train_job(plan=plan))
    scheduler.load(running=1, waiting=1)
    scheduler.busy()
    assert steps(scheduler) == 2
    assert scheduler.busy() == []
    assert steps(scheduler) == 2


def test_whole_steps_run_only_when_idle_and_are_not_cut_short(make: Make) -> None:
    scheduler = make()
    scheduler.tell(UseSystem(policy="idle_steps"))
    scheduler.tell(scheduler.train_job())
    scheduler.load(running=1)
    assert scheduler.busy() == []
    scheduler.load()
    scheduler.on_quantum = lambda count: scheduler.arrive() if count == 3 else None
    assert len(scheduler.idle()) > 3
    assert steps(scheduler) == 1


def test_an_unpaced_trainer_needs_nobody_to_call_it_and_rests_when_told(make: Make) -> None:
    scheduler = make()
    scheduler.tell(UseSystem(policy="unpaced"))
    scheduler.tell(scheduler.train_job(), unpaced=True)
    job, until = scheduler.cotrainer.job, time.monotonic() + PATIENCE_S
    assert job is not None
    while not job.state.final and time.monotonic() < until:
        time.sleep(0.01)
    assert job.state is JobState.DONE
    scheduler.tell(UseSystem(policy="rest"))
    scheduler.tell(scheduler.train_job("other"))
    scheduler.load(running=1)
    assert [scheduler.busy() for _ in range(3)] == [[], [], []]
    assert steps(scheduler) == 0


@pytest.mark.parametrize("policy", ["unpaced", "idle_steps"])
def test_on_a_device_that_lags_a_baseline_waits_for_it(make: Make, policy: Any) -> None:
    scheduler = make()
    scheduler.cotrainer.lane = DeviceLane(LaggingDevice(3.0))
    scheduler.tell(UseSystem(policy=policy))
    job_order = scheduler.train_job()
    scheduler.tell(job_order, unpaced=policy == "unpaced")
    job, until = scheduler.cotrainer.job, time.monotonic() + PATIENCE_S
    assert job is not None
    while not job.state.final and time.monotonic() < until:
        scheduler.idle()
    assert (job.state, steps(scheduler)) == (JobState.DONE, job_order.plan.steps), job.error
    quanta = scheduler.cotrainer.counts.quanta
    assert quanta["attention"].count == quanta["attention_backward"].count > 0
    assert quanta["attention"].launch_s > 0


def test_baselines_teach_umbels_predictor_nothing(make: Make) -> None:
    scheduler = make()
    umbels = scheduler.cotrainer.predictor
    kinds: tuple[Any, ...] = ("aimd", "unpaced", "slo_steps", "idle_steps", "stop_the_world")
    for kind in kinds:
        scheduler.tell(UseSystem(policy=kind))
        assert scheduler.cotrainer.predictor is not umbels, kind
    scheduler.tell(UseSystem(policy="rest", disturbed=True))
    assert scheduler.cotrainer.predictor is not umbels
    for kind in ("rest", "slo", "slo_pause", "slo_long"):
        scheduler.tell(UseSystem(policy=kind))  # type: ignore[arg-type]
        assert scheduler.cotrainer.predictor is umbels, kind


def test_longer_quanta_are_those_of_an_idle_engine(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = make()
    asked: list[bool] = []
    monkeypatch.setattr(CoTrainer, "tune", lambda self, now, idle=False: asked.append(idle))
    for policy in ("slo", "slo_long"):
        scheduler.tell(UseSystem(policy=policy))  # type: ignore[arg-type]
        scheduler.cotrainer.tune(0.0)
    assert asked == [False, True]


def test_time_beside_quanta_is_counted(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = make()
    scheduler.tell(UseSystem(policy="slo"))
    scheduler.cotrainer.governor = scheduler.grants  # quanta that are said to take a second would be paused after
    scheduler.tell(scheduler.train_job("first"))
    scheduler.load(running=1)
    before = scheduler.tell(StatusQuery()).quanta[HOOKS]
    for _ in range(5):
        scheduler.busy()
    after = scheduler.tell(StatusQuery()).quanta
    assert after[HOOKS].count == before.count + 5 + 1, "and the call in which the status was asked for"
    assert after[HOOKS].seconds - before.seconds > 0
    assert after[JOBLESS].count == 0
    scheduler.finish()
    scheduler.tell(scheduler.train_job("second"))
    assert scheduler.tell(StatusQuery()).quanta[JOBLESS].count == 1
    scheduler.finish()
    scheduler.tell(UseSystem(policy="slo"))
    scheduler.tell(scheduler.train_job("of another block"))
    assert scheduler.tell(StatusQuery()).quanta[JOBLESS].count == 1
