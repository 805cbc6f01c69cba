"""A simulated machine: latencies linear in the batch, random factors of a known spread."""

from itertools import islice

import numpy as np
import pytest

from serving.bench.machines import P99, PRESETS, Machine, TimedQuantum, calibrated
from serving.cotrainer.predictor import Batch

QUANTA = (TimedQuantum("mlp", 64, 0.004), TimedQuantum("head", 64, 0.008))
MACHINE = Machine(decode=(0.010, 0.002, 1e-5), prefill=(0.020, 0.001, 1e-4), quanta=QUANTA, hiccup=(0.0, 1.0))


def test_latencies_are_linear_in_the_batch() -> None:
    assert MACHINE.seconds(Batch("decode", 3, cached_tokens=100)) == pytest.approx(0.010 + 3 * 0.002 + 100 * 1e-5)
    assert MACHINE.seconds(Batch("prefill", 2, 50, 200)) == pytest.approx(0.020 + 50 * 0.001 + 200 * 1e-4)


def test_factors_have_the_spread_that_is_stated() -> None:
    logarithms = np.log(list(islice(MACHINE.factors(seed=0), 20_000)))
    assert logarithms.mean() == pytest.approx(0.0, abs=0.005)
    assert logarithms.std() == pytest.approx(MACHINE.noise, rel=0.05)


def test_hiccups_are_as_frequent_as_is_stated() -> None:
    machine = Machine((0.0,) * 3, (0.0,) * 3, QUANTA, noise=0.0, hiccup=(0.1, 5.0))
    factors = list(islice(machine.factors(seed=0), 20_000))
    assert set(factors) == {1.0, 5.0}
    assert factors.count(5.0) == pytest.approx(2_000, rel=0.1)


def test_an_exact_machine_has_none_of_either() -> None:
    machine = Machine((0.0,) * 3, (0.0,) * 3, QUANTA, noise=0.0, hiccup=(0.0, 1.0))
    assert set(islice(machine.factors(seed=0), 5_000)) == {1.0}


def test_a_seed_is_a_sequence() -> None:
    first, again, other = (list(islice(MACHINE.factors(seed), 2_000)) for seed in (1, 1, 2))
    assert first == again != other


def test_a_calibrated_predictor_knows_quanta_and_no_iteration() -> None:
    predictor = calibrated(MACHINE)
    for quantum in QUANTA:
        assert predictor.quantum_high(quantum) == pytest.approx(quantum.seconds * np.exp(P99 * MACHINE.noise))
    assert not predictor.ready


@pytest.mark.parametrize("preset", PRESETS)
def test_a_presets_step_has_a_backward_for_each_forward(preset: str) -> None:
    kinds = [quantum.kind for quantum in PRESETS[preset].quanta]
    for kind in ("attention", "mlp"):
        assert kinds.count(kind) == kinds.count(f"{kind}_backward") > 0
    assert kinds[-1] == "optimizer"
