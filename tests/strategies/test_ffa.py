"""`FFA`, and `RoLoRA` in one round: rules that train one factor and freeze the other."""

import numpy as np
import pytest

from strategies.adapter import Adapter
from strategies.ffa import FFA
from strategies.rolora import RoLoRA
from strategies.strategy import LoraStrategy
from tests.toys.adapters import adapter, dense, distance, moved, update
from umbel import peft_dir
from umbel.messages import TrainPlan

PLAN = TrainPlan(rank=8, steps=1, seconds=1.0)


def only(factor: str, received: Adapter, seed: int) -> peft_dir.Tensors:
    """Training that moves one factor."""
    trained = moved(received, seed)
    return {name: trained[name] if f"lora_{factor}" in name else array for name, array in received.tensors.items()}


@pytest.mark.parametrize(("rule", "factor"), [(FFA, "B"), (RoLoRA, "B"), (RoLoRA, "A")])
def test_one_trained_factor_makes_the_mean_of_factors_exact(rule: type[LoraStrategy], factor: str) -> None:
    """With A shared (FFA-LoRA, arXiv 2403.12313) or B shared (RoLoRA's other round) nothing diverges."""
    parent, strategy = adapter(), rule()
    assert strategy.plan(PLAN, 1 if factor == "B" else 2, 32).factors == factor
    updates = [update(f"site-{i}", parent, only(factor, parent, i), held_examples=100 * (i + 1)) for i in range(3)]
    result = strategy.aggregate(parent, updates)
    assert 0.0 < max(result.certificate.values()) < 1e-7, "what float32 leaves out"
    for module, mean in dense(result.tensors).items():
        wanted = sum((i + 1) / 6 * dense(only(factor, parent, i))[module] for i in range(3))
        assert distance(mean, wanted) < 1e-6
    frozen = [name for name in parent.tensors if f"lora_{factor}" not in name]
    assert all(np.array_equal(result.tensors[name], parent.tensors[name]) for name in frozen)


@pytest.mark.parametrize(("rule", "factor"), [(FFA, "A"), (RoLoRA, "A")])
def test_a_site_that_trained_the_other_factor_is_left_out(rule: type[LoraStrategy], factor: str) -> None:
    parent, strategy = adapter(), rule()
    strategy.plan(PLAN, 1, 32)
    result = strategy.aggregate(parent, [update("wrong", parent, only(factor, parent, 1))])
    assert "lora_A was changed" in result.left_out["wrong"]
    assert result.tensors == {}
