"""`FedSA`: A is averaged, B stays at its site."""

import ml_dtypes
import numpy as np
import pytest
import torch

from strategies.adapter import Adapter, Update
from strategies.fedit import FedIT
from strategies.fedsa import FedSA
from tests.toys.adapters import adapter, dense, distance, moved, random_tensors, untrained, update
from umbel import peft_dir
from umbel.adapter import Personal
from umbel.messages import TrainPlan

PLAN = TrainPlan(rank=8, steps=1, seconds=1.0)
SITES = {"a": 100, "b": 300}
"""Site → the tokens it trains on."""


def sent(site: str, received: Adapter, seed: int, step: float = 0.1, **report: object) -> Update:
    """An update of FedSA: A is moved, B is as it came."""
    trained = moved(received, seed, step)
    tensors = {name: trained[name] if "lora_A" in name else array for name, array in received.tensors.items()}
    return update(site, received, tensors, **report)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_fedsa_is_the_mean_of_a_and_leaves_b_as_it_was_to_the_bit(dtype: type) -> None:
    for parent in (untrained(dtype), adapter(dtype=dtype)):
        updates = [sent(site, parent, seed, held_examples=count) for seed, (site, count) in enumerate(SITES.items())]
        result = FedSA().aggregate(parent, updates)
        assert result.weights == {"a": 0.25, "b": 0.75}
        assert result.certificate == {}, "there is no mean of ΔW to be near to"
        one, other = (peft_dir.decode(each.blob) for each in updates)
        for name, array in result.tensors.items():
            if "lora_B" in name:
                assert np.array_equal(array, parent.tensors[name].astype(np.float32))
            else:
                wanted = 0.25 * one[name].astype(np.float64) + 0.75 * other[name].astype(np.float64)
                assert np.allclose(array.astype(np.float64), wanted, atol=1e-6 if dtype is np.float32 else 0.02)


def test_fedsa_leaves_out_a_site_that_sends_its_own_b() -> None:
    parent = untrained()
    result = FedSA().aggregate(parent, [sent("a", parent, 1), update("leaky", parent, moved(parent, 2))])
    assert "lora_B was changed" in result.left_out["leaky"]
    assert result.weights == {"a": 1.0}


def test_fedsa_shortens_a_huge_change_although_every_update_equals_the_base() -> None:
    parent = untrained()
    updates = [sent(f"site-{i}", parent, i) for i in range(4)] + [sent("huge", parent, 9, step=5.0)]
    assert all(not product.any() for one in updates for product in dense(peft_dir.decode(one.blob)).values())
    result = FedSA().aggregate(parent, updates)
    assert result.weights["huge"] == pytest.approx(0.2 * 2 / 50, rel=0.5)  # as long as twice the median one
    assert result.weights["site-0"] == pytest.approx(0.2)
    blind = FedIT().aggregate(parent, updates)  # the negative control: in ΔW all changes have length 0
    assert blind.weights["huge"] == pytest.approx(0.2)


@pytest.mark.parametrize(
    "options",
    [
        {"robust": "multi_krum", "byzantine": 2},
        {"robust": "geometric_median"},
        {"robust": "fltrust", "trusted_site": "site-6"},
    ],
)
def test_robust_rules_see_what_fedsa_shares(options: dict[str, object]) -> None:
    """Five sites move A together; the first two of seven move it the other way, three times as far."""
    parent = untrained()
    common, own = random_tensors(50), [random_tensors(60 + i) for i in range(7)]
    updates = []
    for i in range(7):
        times = 1.0 if i >= 2 else -3.0
        tensors = {
            name: array if "lora_B" in name else (array + 0.1 * times * (common[name] + 0.2 * own[i][name]))
            for name, array in parent.tensors.items()
        }
        updates.append(update(f"site-{i}", parent, {k: v.astype(np.float32) for k, v in tensors.items()}))
    result = FedSA(**options).aggregate(parent, updates)
    names = [name for name in parent.tensors if "lora_A" in name]
    change = {name: torch.from_numpy(result.tensors[name] - parent.tensors[name]) for name in names}
    honest = {
        name: torch.from_numpy(0.1 * (common[name] + 0.2 * sum(own[i][name] for i in range(2, 7)) / 5))
        for name in names
    }
    for name in names:
        assert distance(change[name], honest[name]) < 0.3
    assert max(result.weights[f"site-{i}"] for i in (0, 1)) < 0.06


def test_fedsa_asks_for_both_factors_of_one_rank_and_for_b_to_stay() -> None:
    plan = FedSA().plan(PLAN, 1, 32)
    assert (plan.rank, plan.factors, plan.personal, plan.joined_rank) == (8, "AB", Personal(part="B"), 8)
    assert not FedSA.mixed_ranks
