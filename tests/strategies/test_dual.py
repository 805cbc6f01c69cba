"""`Dual`: the global adapter is averaged as in `exact`, and each site keeps one of its own."""

import pytest

from strategies.dual import Dual
from strategies.exact import Exact
from tests.toys.adapters import adapter, moved, update
from umbel import peft_dir
from umbel.adapter import Personal
from umbel.messages import TrainPlan

PLAN = TrainPlan(rank=8, steps=1, seconds=1.0)
SITES = {"a": 100, "b": 300}
"""Site → the tokens it trains on."""


def test_dual_averages_the_global_adapter_as_exact_does() -> None:
    parent = adapter()
    updates = [update(site, parent, moved(parent, seed), held_examples=count)
               for seed, (site, count) in enumerate(SITES.items())]  # fmt: skip
    small = parent.at_rank(2)
    updates.append(update("small", small, moved(small, 7), rank=2))
    result, exact = Dual(personal_rank=4).aggregate(parent, updates), Exact().aggregate(parent, updates)
    assert result.weights == exact.weights == pytest.approx({"a": 0.2, "b": 0.6, "small": 0.2})
    assert peft_dir.encode(result.tensors) == peft_dir.encode(exact.tensors)
    assert result.certificate == exact.certificate


def test_dual_leaves_room_for_the_adapter_that_stays() -> None:
    plans = [Dual(personal_rank=4).plan(PLAN, 1, most) for most in (32, 12, 11, 5)]
    assert [plan.rank for plan in plans] == [8, 8, 7, 1]
    assert [plan.joined_rank for plan in plans] == [12, 12, 11, 5]
    assert {plan.personal for plan in plans} == {Personal(part="adapter", rank=4)}
