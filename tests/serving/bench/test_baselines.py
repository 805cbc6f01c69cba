"""Governors of the baselines train when their policy says so."""

import math

import pytest

from serving.bench.baselines import Aimd, Closed, EverySoOften, PausedByPrefill, StepPredictor, WhenIdle
from serving.cotrainer.governor import Finished, Load, SloGovernor, Stream, Waiting
from serving.cotrainer.predictor import Batch, Predictor
from serving.cotrainer.slo import Slo

SLO = Slo.usual(ttft_s=0.1, tpot_s=0.02)


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
