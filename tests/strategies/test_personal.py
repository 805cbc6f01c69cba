"""Strategies of which a part stays at the sites: what they average, what they admit, and what each site then serves."""

import ml_dtypes
import numpy as np
import pytest
import torch

from client.personal import first, join, split
from strategies.base import Adapter, LoraStrategy, Update
from strategies.catalogue import STRATEGIES
from strategies.dual import Dual
from strategies.exact import Exact
from strategies.fedit import FedIT
from strategies.fedsa import FedSA
from tests.toys.adapters import RANK, SHAPES, adapter, dense, distance, moved, random_tensors, update
from umbel import peft_dir
from umbel.adapter import Personal
from umbel.errors import ConfigError
from umbel.messages import TrainPlan

PLAN = TrainPlan(rank=8, steps=1, seconds=1.0)
SITES = {"a": 100, "b": 300}
"""Site → the tokens it trains on."""


def untrained(dtype: type = np.float32) -> Adapter:
    """A registry's first version: A drawn, B zero."""
    drawn = random_tensors(0, dtype=dtype)
    return adapter({name: np.zeros_like(array) if "lora_B" in name else array for name, array in drawn.items()})


def sent(site: str, received: Adapter, seed: int, step: float = 0.1, **report: object) -> Update:
    """An update of FedSA: A is moved, B is as it came."""
    trained = moved(received, seed, step)
    tensors = {name: trained[name] if "lora_A" in name else array for name, array in received.tensors.items()}
    return update(site, received, tensors, **report)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_fedsa_is_the_mean_of_a_and_leaves_b_as_it_was_to_the_bit(dtype: type) -> None:
    for parent in (untrained(dtype), adapter(dtype=dtype)):
        updates = [sent(site, parent, seed, num_loss_tokens=count) for seed, (site, count) in enumerate(SITES.items())]
        result = FedSA().aggregate(parent, updates)
        assert result.weights == {"a": 0.25, "b": 0.75}
        assert result.certificate == {}, "there is no mean of ΔW to be near to"
        one, other = (peft_dir.decode(each.blob) for each in updates)
        for name, array in result.tensors.items():
            if "lora_B" in name:
                assert array.tobytes() == parent.tensors[name].tobytes()
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


def test_dual_averages_the_global_adapter_as_exact_does() -> None:
    parent = adapter()
    updates = [update(site, parent, moved(parent, seed), num_loss_tokens=count)
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


@pytest.mark.parametrize("rule", [Exact, FedIT])
def test_other_strategies_leave_nothing_at_the_sites(rule: type[LoraStrategy]) -> None:
    assert (rule().plan(PLAN, 1, 32).personal, rule().plan(PLAN, 1, 32).joined_rank) == (None, 8)


@pytest.mark.parametrize(
    ("rule", "options", "reason"),
    [
        (Dual, {}, "needs personal-rank"),
        (Dual, {"personal_rank": 2, "stack_rank": 8}, "only flora stacks"),
        (FedSA, {"personal_rank": 2}, "only dual leaves an adapter"),
        (FedSA, {"server_momentum": 0.9}, "without the B that stay at the sites these are zero"),
        (Exact, {"personal_rank": 2}, "only dual leaves an adapter"),
        (STRATEGIES["flora"], {"stack_rank": 8, "personal_rank": 2}, "only dual leaves an adapter"),
    ],
)
def test_what_makes_no_sense_is_refused_at_start(
    rule: type[LoraStrategy], options: dict[str, object], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        rule(**options)


@pytest.mark.parametrize("rule", [FedSA(), Dual(personal_rank=2)], ids=["fedsa", "dual"])
def test_rounds_from_join_to_join_at_two_sites(rule: LoraStrategy) -> None:
    """What a site serves in the end: Ā with its own B, or the global adapter plus its own."""
    personal = rule.personal
    assert personal is not None
    parent = untrained()
    parts = {site: first(parent.tensors, personal, f"0 {site}") for site in SITES}
    for number in range(1, 4):
        updates = []
        for seed, (site, count) in enumerate(SITES.items()):
            start = adapter(join(parent.tensors, parts[site], personal))
            back, parts[site] = split(moved(start, 10 * number + seed), parent.tensors, personal)
            updates.append(update(site, parent, back, num_loss_tokens=count))
        result = rule.aggregate(parent, updates)
        assert result.left_out == {}
        before, parent = parent, adapter(result.tensors)
    for site in SITES:
        joined = join(parent.tensors, parts[site], personal)
        peft_dir.validate(joined, SHAPES, rank=RANK + personal.rank, max_rank=8)
        for module, product in dense(joined).items():
            own_b = torch.from_numpy(parts[site][peft_dir.key(module, "B")].astype(np.float64))
            if personal.part == "B":
                wanted = own_b @ torch.from_numpy(parent.tensors[peft_dir.key(module, "A")].astype(np.float64))
                assert not dense(parent.tensors)[module].any(), "the registry's version equals the base"
            else:
                own_a = torch.from_numpy(parts[site][peft_dir.key(module, "A")].astype(np.float64))
                wanted = dense(parent.tensors)[module] + own_b @ own_a
            assert distance(product, wanted) < 1e-6
            assert distance(product, dense(join(before.tensors, parts[site], personal))[module]) > 1e-3
