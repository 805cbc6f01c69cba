"""Targets and lengths of quanta follow from what was measured."""

import pytest

from serving.cotrainer.predictor import Predictor
from serving.cotrainer.slo import IDLE_PART, Slo, default_slo, idle_quantum_target, quantum_target
from tests.toys.serving.latencies import DECODE_S, PREFILL_S, SLO, known


def test_quanta_are_shorter_than_what_an_iteration_leaves() -> None:
    predictor = known()
    assert quantum_target(SLO, predictor, accelerator=False) == pytest.approx(0.5 * (0.03 - DECODE_S))
    assert quantum_target(Slo.usual(1.0, DECODE_S), predictor, accelerator=False) == pytest.approx(0.05 * DECODE_S)
    assert quantum_target(SLO, predictor, accelerator=True) == 2e-3
    assert quantum_target(Slo.usual(1.0, 0.01), predictor, accelerator=True) == pytest.approx(1e-3)


def test_default_targets_are_multiples_of_what_was_measured() -> None:
    slo = default_slo(known())
    assert slo is not None
    assert (slo.ttft_s, slo.tpot_s) == (pytest.approx(3 * (PREFILL_S + DECODE_S)), pytest.approx(2 * DECODE_S))
    assert default_slo(Predictor()) is None


def test_an_idle_engine_has_longer_quanta_but_never_shorter_ones() -> None:
    assert idle_quantum_target(SLO, busy=0.001) == pytest.approx(IDLE_PART * SLO.ttft_s)
    assert idle_quantum_target(SLO, busy=1.0) == 1.0


def test_only_the_batch_class_has_more_time() -> None:
    assert (SLO.factor(interactive=True), SLO.factor(interactive=False)) == (1.0, SLO.batch_factor)
