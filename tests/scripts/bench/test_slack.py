"""The ablation takes away what it says, gives every variant the same users, and leaves the governor as it was."""

from dataclasses import replace

import numpy as np
import pytest

from scripts.tools.bench.slack import CACHED, LONG, LONGER, PARTS, WHOLE, CutShort, Users, Variant, WholePrompts, line
from serving.bench.machines import PRESETS
from serving.bench.trace import Arrival
from serving.cotrainer import predictor as predictor_module
from serving.cotrainer.predictor import Batch

CPU = PRESETS["cpu"]


def test_the_same_seed_draws_the_same_users() -> None:
    first, again, other = (list(CACHED["cpu"].arrivals(20.0, seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert all(arrival.cached == int(0.9 * arrival.prompt) for arrival in first)
    assert any(arrival.prompt == LONG for arrival in LONGER["gpu"].arrivals(60.0, 0))


def test_a_governor_without_the_cache_is_told_the_whole_prompt() -> None:
    simulation = WholePrompts(CPU, [Arrival(0.0, 100, 2, cached=90)])
    simulation._receive()
    (waiting,) = simulation._load().waiting
    assert (waiting.prompt_tokens, waiting.cached_tokens, waiting.asked_tokens) == (100, 0, 100)


def test_one_duration_in_twenty_is_cut_short() -> None:
    predictor = CutShort()
    for _ in range(40):
        predictor.observe(Batch("decode", 1), 1.0)
    seconds = predictor._models["decode"]._seconds[:40]
    assert sorted(set(seconds)) == [0.1, 1.0]
    assert list(seconds).count(0.1) == 2


@pytest.mark.parametrize("variant", [WHOLE, *(part[-1] for part in PARTS)])
def test_each_variant_trains_and_leaves_the_fit_as_it_was(variant: Variant) -> None:
    kept = predictor_module.REWEIGHTED, predictor_module.OUTLIER
    machine = replace(CPU, hiccup=(0.0, 1.0))
    result = variant.run(machine, tuple(Users(1.0, 64, 8).arrivals(10.0, 0)), 10.0, 0)
    assert kept == (predictor_module.REWEIGHTED, predictor_module.OUTLIER)
    assert result.steps > 100
    assert 0 <= result.counted <= 1 >= result.in_time


def test_a_row_has_the_means_and_the_error_of_the_difference() -> None:
    results = np.array([[(1.0, 1.0, 10.0), (0.5, 0.25, 8.0)], [(1.0, 1.0, 20.0), (0.5, 0.25, 14.0)]])
    assert line([1.0, 0.9], results).split() == (
        ["95.00%", "100.00%", "→", "50.00%", "100.00%", "→", "25.00%", "15.0", "→", "11.0", "(-4.0", "±", "2.0)"]
    )
