"""The certificate is of what is published: measured after the last rounding, against a dense computation."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from strategies.adapter import Adapter, Update, factors_of
from strategies.exact import Exact
from strategies.ffa import FFA
from strategies.flora import FLoRA
from strategies.lowrank import LowRank, distances
from strategies.strategy import LoraStrategy
from tests.toys.adapters import adapter, dense, update
from umbel import peft_dir

SIDE, RANK, MODULE = 128, 8, "model.layers.0.self_attn.q_proj"
A, B = (peft_dir.key(MODULE, factor) for factor in "AB")
BF16: Any = ml_dtypes.bfloat16


def parent_in(dtype: type) -> Adapter:
    rng = np.random.default_rng(0)
    return adapter({A: rng.normal(size=(RANK, SIDE)).astype(dtype), B: rng.normal(size=(SIDE, RANK)).astype(dtype)})


def trained(parent: Adapter, size: float, new: bool, dtype: type) -> list[Update]:
    """Four sites that change B by `size` of its length, and A, too, if their directions are to be `new`."""
    rng = np.random.default_rng(1)
    updates = []
    for site in "abcd":
        moved = {
            name: (array + size * rng.normal(size=array.shape) * (new or name == B)).astype(dtype)
            for name, array in parent.tensors.items()
        }
        updates.append(update(site, parent, moved))
    return updates


def truth(parent: Adapter, updates: list[Update], tensors: peft_dir.Tensors) -> tuple[float, float]:
    """(‖published − exact‖ / ‖exact‖, the same over ‖exact − G‖), from dense float64 matrices."""
    exact = sum(dense(peft_dir.decode(one.blob))[MODULE] for one in updates) / len(updates)
    error = torch.linalg.norm(dense(tensors)[MODULE] - exact)
    return float(error / torch.linalg.norm(exact)), float(
        error / torch.linalg.norm(exact - dense(parent.tensors)[MODULE])
    )


@pytest.mark.parametrize("dtype", [np.float32, BF16])
@pytest.mark.parametrize(("size", "new"), [(0.2, True), (0.02, True), (0.2, False), (0.02, False), (0.005, False)])
def test_the_certificate_is_the_dense_error_of_what_is_published(dtype: type, size: float, new: bool) -> None:
    """A registry whose versions are in float32, or whose parent and updates are in bfloat16, as it once was."""
    parent = parent_in(dtype)
    updates = trained(parent, size, new, dtype)
    result = Exact(norm_clip=1e9).aggregate(parent, updates)
    of_version, of_change = truth(parent, updates, result.tensors)
    assert result.certificate[MODULE] == pytest.approx(of_version, rel=0.05)
    assert result.change_certificate[MODULE] == pytest.approx(of_change, rel=0.05)
    assert result.change_certificate[MODULE] > result.certificate[MODULE] > 0.0


@pytest.mark.parametrize("rule", [FFA, FLoRA])
def test_rules_that_lose_nothing_say_what_rounding_loses(rule: type[LoraStrategy]) -> None:
    parent = parent_in(np.float32)
    updates = trained(parent, 0.02, False, np.float32)
    result = rule(norm_clip=1e9, **({"stack_rank": 64} if rule is FLoRA else {})).aggregate(parent, updates)
    of_version, of_change = truth(parent, updates, result.tensors)
    assert result.certificate[MODULE] == pytest.approx(of_version, rel=0.05)
    assert of_version < 1e-6
    assert result.change_certificate[MODULE] == pytest.approx(of_change, rel=0.05)


def test_a_late_round_learns_what_bfloat16_would_have_lost() -> None:
    """A change of half a percent: in bfloat16 a version would be wrong by nearly half of it."""
    parent = parent_in(np.float32)
    updates = trained(parent, 0.005, False, np.float32)
    result = Exact(norm_clip=1e9).aggregate(parent, updates)
    assert truth(parent, updates, result.tensors)[1] < 1e-3
    of_version, of_change = truth(parent, updates, peft_dir.rounded(result.tensors, "bfloat16"))
    assert of_change > 0.2
    assert of_version == pytest.approx(2.3e-3, rel=0.1), "what an engine in bfloat16 rounds off when it loads it"


def test_a_round_that_changes_nothing_loses_nothing() -> None:
    parent = parent_in(BF16)
    result = Exact().aggregate(parent, [update("a", parent, parent.tensors)])
    assert (result.certificate, result.change_certificate) == ({MODULE: 0.0}, {MODULE: 0.0})


@pytest.mark.parametrize("apart", [0.3, 1e-3, 1e-6, 1e-9, 0.0])
def test_a_distance_is_right_however_near_two_updates_are(apart: float) -> None:
    one = factors_of(parent_in(np.float32).tensors)[MODULE].to("cpu", torch.float64)
    moved = torch.randn(one.B.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    other = LowRank(one.B + apart * moved, one.A)
    nothing = LowRank(torch.zeros_like(one.B), one.A)
    error, size, changed = distances(one, other, nothing)
    assert error == pytest.approx(float(torch.linalg.norm(apart * moved @ one.A)), rel=1e-4, abs=1e-11)
    assert size == changed == pytest.approx(float(torch.linalg.norm(other.dense())))
