"""Each compared system trains when its policy says so, in pieces of its size, switched in a running engine."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serving.bench.systems import (
    Aimd,
    Closed,
    EverySoOften,
    PausedByPrefill,
    StepPredictor,
    UseSystem,
    WhenIdle,
    governor_of,
)
from serving.cotrainer.governor import Finished, Load, SloGovernor, Stream, Waiting
from serving.cotrainer.predictor import Batch, Predictor
from serving.cotrainer.slo import Slo
from tests.toys.scheduler import Make, ToyScheduler
from tests.toys.serving.bench_scheduler import bench_schedulers
from umbel.messages import JobState

SLO = Slo.usual(ttft_s=0.1, tpot_s=0.02)


PATIENCE_S = 60.0


BUSY = Load(streams=(Stream(first_token=0.0, tokens=5, context=20),))


def known() -> Predictor:
    """A predictor that has seen an engine of 5 ms decodes and 10 ms prefills."""
    predictor = Predictor()
    for number in range(64):
        predictor.observe(Batch("decode", 1 + number % 4, cached_tokens=20), 0.005)
        predictor.observe(Batch("prefill", 1, 10 + number % 4, 50), 0.010)
    predictor.seed_quantum("mlp", 64, 0.001)
    return predictor


def test_a_closed_engine_trains_neither_busy_nor_idle() -> None:
    assert Closed().budget(BUSY, 0.0) == 0.0
    assert math.isinf(Closed().wait(0.0))


def test_idle_steps_wait_until_nobody_has_been_served_for_a_while() -> None:
    governor = WhenIdle(delay=0.5)
    assert governor.wait(10.0) == 0.0
    assert governor.budget(BUSY, 10.0) == 0.0
    assert governor.wait(10.1) == pytest.approx(0.4)
    assert governor.wait(10.6) == 0.0


def test_the_world_is_stopped_once_per_period_whoever_waits() -> None:
    predictor = StepPredictor(known())
    predictor.observe_step(0.3)
    governor = EverySoOften(2.0, predictor)
    waiting = Load(waiting=(Waiting(arrival=9.0, prompt_tokens=8),))
    assert governor.budget(waiting, 10.0) == 0.3 == predictor.quantum_high(None), "one stop fits in"
    for at in (10.1, 10.2, 10.3):  # the quanta of one stop
        governor.ran(0.1, at)
    assert governor.budget(waiting, 11.9) == 0.0
    assert governor.wait(11.0) == pytest.approx(1.0), "from the start of a stop to the next"
    assert governor.budget(waiting, 12.0) == 0.3


def test_a_step_is_one_quantum_to_a_predictor_of_steps() -> None:
    predictor = StepPredictor(known())
    assert 0 < predictor.longest_quantum() < 1e-5, "never nothing: it would fit into a budget of nothing"
    predictor.observe_quantum(None, 9.0)
    for seconds in (0.1, 0.2, 0.3):
        predictor.observe_step(seconds)
    assert predictor.longest_quantum() == pytest.approx(0.3, rel=0.02)
    assert predictor.typical("decode") == known().typical("decode")


def test_aimd_adds_after_each_request_in_time_and_halves_after_one_that_was_late() -> None:
    governor = Aimd(SLO)
    begin = governor.budget(BUSY, 0.0)
    for _ in range(9):
        governor.finished(Finished(ttft=0.05, tpot=0.01, tokens=3), now=0.0)
    assert governor.budget(BUSY, 0.0) == pytest.approx(10 * begin)
    governor.finished(Finished(ttft=0.05, tpot=0.03, tokens=3), now=0.0)
    assert governor.budget(BUSY, 0.0) == pytest.approx(5 * begin)
    governor.finished(Finished(ttft=0.2, tpot=None, tokens=0), now=0.0)
    assert governor.budget(BUSY, 0.0) == pytest.approx(2.5 * begin)


def test_pausing_on_every_prefill_differs_only_while_a_request_waits() -> None:
    shares = {"share_floor": 0.0, "share_cap": 1.0}
    umbels, paused = SloGovernor(SLO, known(), **shares), PausedByPrefill(SLO, known(), **shares)
    for governor in (umbels, paused):
        governor.iterated(Batch("decode", 1), 0.005)
    waiting = Load(waiting=(Waiting(arrival=0.0, prompt_tokens=8),))
    assert umbels.budget(BUSY, 0.01) == paused.budget(BUSY, 0.01) > 0
    assert umbels.budget(waiting, 0.01) > 0 == paused.budget(waiting, 0.01)


@pytest.mark.parametrize("kind", ["rest", "unpaced"])
def test_who_trains_elsewhere_gets_nothing_of_the_engines_loop(kind: Any) -> None:
    assert type(governor_of(UseSystem(policy=kind), SLO, known())) is Closed


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


def test_baselines_teach_umbels_predictor_nothing(make: Make) -> None:
    scheduler = make()
    umbels = scheduler.cotrainer.predictor
    kinds: tuple[Any, ...] = ("aimd", "unpaced", "slo_steps", "idle_steps", "stop_the_world")
    for kind in kinds:
        scheduler.tell(UseSystem(policy=kind))
        assert scheduler.cotrainer.predictor is not umbels, kind
    scheduler.tell(UseSystem(policy="rest", disturbed=True))
    assert scheduler.cotrainer.predictor is not umbels
    for kind in ("rest", "slo", "slo_pause"):
        scheduler.tell(UseSystem(policy=kind))  # type: ignore[arg-type]
        assert scheduler.cotrainer.predictor is umbels, kind
