"""Sites that did different numbers of steps, and hold different amounts of data: FedNova (arXiv 2007.07481)."""

import statistics
from pathlib import Path

import numpy as np
import pytest
import torch

from strategies.adapter import Adapter, Aggregate, Update, factors_of
from strategies.exact import Exact
from strategies.ffa import FFA
from strategies.strategy import LoraStrategy
from tests.toys.adapters import (
    ATTACKED,
    HONEST,
    WIDE,
    adapter,
    attacked,
    away,
    dense,
    distance,
    moved,
    parent_adapter,
    update,
    wide,
)
from umbel import peft_dir

A, B = (peft_dir.key("model.layers.0.self_attn.q_proj", factor) for factor in "AB")
WIDTH, STEPS, ROUNDS = 16, 20, 100
LOUD, EXACT = {"norm_clip": 1e9}, 1e-5


def settled(busy_steps: int, *, told: bool) -> float:
    """Where the mean of two sites with equal data settles that pull to −1 (the busy one) and +1; 0 is right.

    Both train the B of one module with AdamW, which is reset in each round as at a site. `told`: they say how many
    steps they took; otherwise the mean is one of whole changes.
    """
    generator = torch.Generator().manual_seed(0)
    rule: LoraStrategy = FFA()
    now = adapter({A: np.ones((1, 1), np.float32), B: np.zeros((WIDTH, 1), np.float32)})
    means = []
    for _ in range(ROUNDS):
        updates = []
        for site, best, steps in (("busy", -1.0, busy_steps), ("idle", 1.0, STEPS)):
            b = torch.nn.Parameter(torch.from_numpy(now.tensors[B].copy()))
            optimizer = torch.optim.AdamW([b], lr=1e-2, weight_decay=0.0)
            for _ in range(steps):
                b.grad = b.detach() - best + torch.randn(b.shape, generator=generator)
                optimizer.step()
            tensors = {A: now.tensors[A], B: b.detach().numpy()}
            updates.append(update(site, now, tensors, steps=steps if told else STEPS))
        now = adapter(rule.aggregate(now, updates).tensors)
        means.append(float(now.tensors[B].mean()))
    return statistics.fmean(means[ROUNDS // 2 :])


def test_a_site_that_is_stopped_at_half_its_steps_pulls_as_hard_as_the_other() -> None:
    assert abs(settled(STEPS // 2, told=True)) < 0.05
    assert settled(STEPS // 2, told=False) > 0.4, "the negative control"


RULES = [("data", [1, 3, 6]), ("tokens", [50, 30, 20]), ("equal", [1, 1, 1])]


@pytest.mark.parametrize(("weights", "counted"), RULES)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_the_mean_step_is_taken_as_often_as_the_mean_site_did(
    tmp_path: Path, weights: str, counted: list[int], order: tuple[int, ...]
) -> None:
    """G' = G + (Σ p_i τ_i) Σ p_i Δ_i / τ_i, whoever answers first."""
    parent, steps = wide(1, 4), [5, 20, 10]
    trained = [moved(parent, seed) for seed in range(3)]
    updates = [
        update(f"site-{i}", parent, trained[i], steps=steps[i], held_examples=RULES[0][1][i],
               held_loss_tokens=RULES[1][1][i])
        for i in range(3)
    ]  # fmt: skip
    fold = Exact(weights=weights, **LOUD).begin(parent, tmp_path, 3)
    for index in order:
        fold.add(updates[index])
    result = fold.finish()
    shares = [count / sum(counted) for count in counted]
    assert [result.weights[f"site-{i}"] for i in range(3)] == pytest.approx(shares)
    typical = sum(share * count for share, count in zip(shares, steps, strict=True))
    before = dense(parent.tensors)
    for module in WIDE:
        change = sum(
            share * typical / count * (dense(one)[module] - before[module])
            for share, count, one in zip(shares, steps, trained, strict=True)
        )
        error = distance(dense(result.tensors)[module], before[module] + change)
        assert error <= result.certificate[module] * 1.01 + 1e-7


def changed(result: Aggregate, parent: Adapter) -> torch.Tensor:
    before, after = dense(parent.tensors), dense(result.tensors)
    return torch.cat([(after[module] - before[module]).flatten() for module in ATTACKED])


def test_few_steps_claimed_for_a_long_change_are_shortened_like_a_long_change() -> None:
    """What is compared with the median is the change per step, so a false count of steps wins nothing."""
    parent = parent_adapter()
    honest = [update(f"site-{i}", parent, away(parent, 1.0, i, 0.2), steps=STEPS) for i in range(4)]
    result = Exact().aggregate(parent, [*honest, update("liar", parent, away(parent, 1.0, 9, 0.2), steps=1)])
    assert result.weights["liar"] == pytest.approx(0.2 * 2 / STEPS, rel=0.1)
    assert result.weights["site-0"] == pytest.approx(0.2)


def test_many_steps_claimed_do_not_lengthen_what_the_others_did() -> None:
    """Four sites that were busy, and one that says it did all of the plan's steps, and holds most of the data."""
    parent = parent_adapter()

    def length(steps: int, held: int) -> float:
        busy = [update(f"site-{i}", parent, away(parent, 1.0, i, 0.2), steps=STEPS // 4) for i in range(4)]
        liar = update("liar", parent, away(parent, 1.0, 9, 0.2), steps=steps, held_examples=held)
        return float(changed(Exact().aggregate(parent, [*busy, liar]), parent).norm())

    honest = length(STEPS // 4, 100)
    assert length(1000 * STEPS, 100) < 1.3 * honest, "a fifth of the sites, twice the median's steps"
    assert length(1000 * STEPS, 10**7) < 2.1 * honest, "and whatever it says it holds"


ROBUST = [
    {"robust": "geometric_median"},
    {"robust": "multi_krum", "byzantine": 3},
    {"robust": "fltrust", "trusted_site": "honest-0"},
]


@pytest.mark.parametrize("options", ROBUST)
def test_under_a_robust_rule_no_false_count_of_steps_decides_how_far_the_mean_goes(options: dict[str, object]) -> None:
    parent = parent_adapter()

    def told(steps: int) -> list[Update]:
        return [
            update(one.site, parent, peft_dir.decode(one.blob), steps=STEPS if "honest" in one.site else steps)
            for one in attacked(parent)
        ]

    plain, lied = (changed(Exact(**options).aggregate(parent, told(steps)), parent) for steps in (STEPS, 1))
    assert distance(lied, plain) < 0.2
    assert len(told(1)) // 2 < HONEST


def test_a_busy_site_is_no_outlier_to_a_robust_rule() -> None:
    """Five sites whose steps pull alike, two of them stopped at a quarter: none is left out for its length."""
    parent = parent_adapter()
    updates = [update(f"site-{i}", parent, away(parent, 1.0, i, 0.2), steps=STEPS) for i in range(4)]
    updates.append(update("busy", parent, away(parent, 0.25, 4, 0.2), steps=STEPS // 4))
    result = Exact(robust="multi_krum", byzantine=1).aggregate(parent, updates)
    assert "busy" not in result.left_out, "one of five is always left out: here the one of most noise"


def test_what_nobody_changed_stays_whatever_the_steps() -> None:
    parent = wide(1, 4)
    result = Exact().aggregate(
        parent, [update(site, parent, parent.tensors, steps=n) for site, n in zip("ab", (1, 9), strict=True)]
    )
    assert peft_dir.encode(result.tensors) == peft_dir.encode(parent.tensors)
    assert set(factors_of(result.tensors)) == set(WIDE)
