"""Exact low-rank arithmetic against dense float64 algebra."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.exact import merge
from strategies.lowrank import LowRank, align, concat, truncate, weighted_sum

RNG = np.random.default_rng(7)


def random_update(m: int, n: int, rank: int, scale: float = 1.0, rng: np.random.Generator = RNG) -> LowRank:
    return LowRank(rng.normal(size=(m, rank)), rng.normal(size=(rank, n)), scale)


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def rotated(update: LowRank, rng: np.random.Generator = RNG) -> LowRank:
    gauge = rng.normal(size=(update.rank, update.rank)) + 3 * np.eye(update.rank)
    return LowRank(update.B @ gauge, np.linalg.inv(gauge) @ update.A, update.scale)


def test_weighted_sum_of_mixed_ranks_and_scales_is_exact_when_the_rank_suffices() -> None:
    updates = [random_update(70, 60, rank, 2.0 / rank) for rank in (4, 8, 16, 8, 2)]
    weights = [0.1, 0.3, 0.2, 0.25, 0.15]
    dense = sum(w * u.dense() for w, u in zip(weights, updates, strict=True))
    result, error = truncate(weighted_sum(updates, weights), 38)
    assert distance(result.dense(), dense) < 1e-12
    assert error < 1e-12


@pytest.mark.parametrize("ranks", [(4, 8, 6), (30, 30, 30)], ids=["QR", "dense fallback"])
def test_truncation_error_is_eckart_young_and_equals_the_certificate(ranks: tuple[int, ...]) -> None:
    total = concat([random_update(50, 40, rank) for rank in ranks])
    result, error = truncate(total, 5)
    singular = np.linalg.svd(total.dense(), compute_uv=False)
    tail = float(np.linalg.norm(singular[5:]) / np.linalg.norm(singular))
    assert abs(distance(result.dense(), total.dense()) - tail) < 1e-10
    assert abs(error - tail) < 1e-10


def test_fedit_error_identity_for_two_sites() -> None:
    one, two = random_update(30, 20, 4), random_update(30, 20, 4)
    exact = weighted_sum([one, two], [0.5, 0.5]).dense()
    fedit = LowRank((one.B + two.B) / 2, (one.A + two.A) / 2).dense()
    identity = 0.25 * (one.B - two.B) @ (one.A - two.A)
    assert np.abs(exact - fedit - identity).max() < 1e-12


def test_idle_sites_of_mixed_ranks_change_nothing_in_twenty_rounds() -> None:
    # A plain mean of the truncated updates ends with most of this update lost (raFLoRA, arXiv 2602.13486).
    start = random_update(48, 40, 32)
    parent = truncate(start, 32)[0]
    for _ in range(20):
        received = [rotated(truncate(parent, rank)[0]) for rank in (4, 8, 16, 32)]
        trained = [rotated(update) for update in received]
        parent, _ = merge(parent, trained, [0.25] * 4, received)
    assert distance(parent.dense(), start.dense()) < 1e-10


def test_identical_updates_leave_the_factors_as_they_are() -> None:
    untrained = LowRank(np.zeros((9, 3)), RNG.normal(size=(3, 7)))
    merged, error = merge(untrained, [untrained, untrained], [0.4, 0.6])
    assert merged is untrained
    assert error == 0.0


def test_aggregate_does_not_depend_on_the_gauge_of_the_sites() -> None:
    parent = random_update(40, 30, 6)
    same = random_update(40, 30, 6)
    copies = [rotated(same) for _ in range(9)]
    merged, _ = merge(parent, copies, [1 / 9] * 9)
    assert distance(merged.dense(), same.dense()) < 1e-10
    mean_of_factors = LowRank(sum(c.B for c in copies) / 9, sum(c.A for c in copies) / 9)
    assert distance(mean_of_factors.dense(), same.dense()) > 0.01  # what FedIT would make of it


def test_align_keeps_the_update_and_brings_rotated_factors_back() -> None:
    update = truncate(random_update(40, 30, 6), 6)[0]
    rotation = np.linalg.qr(RNG.normal(size=(6, 6)))[0]
    back = align(LowRank(update.B @ rotation, rotation.T @ update.A), update)
    assert distance(back.B, update.B) < 1e-10
    assert distance(back.A, update.A) < 1e-10


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="no common rank"):
        LowRank(np.zeros((3, 2)), np.zeros((1, 4)))
    with pytest.raises(ValueError, match="different layers"):
        concat([random_update(4, 3, 1), random_update(3, 4, 1)])
    with pytest.raises(ValueError, match="rank 0"):
        truncate(random_update(4, 3, 1), 0)
    with pytest.raises(ValueError, match="cannot align"):
        align(random_update(4, 3, 1), random_update(4, 3, 2))


dimension = st.integers(1, 12)


@settings(max_examples=60, deadline=None)
@given(m=dimension, n=dimension, ranks=st.lists(st.integers(1, 9), min_size=1, max_size=4), keep=st.integers(1, 14),
       seed=st.integers(0, 2**32 - 1))  # fmt: skip
def test_truncation_is_never_worse_than_its_certificate(m: int, n: int, ranks: list[int], keep: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    total = concat([random_update(m, n, rank, rng=rng) for rank in ranks])
    result, error = truncate(total, keep)
    assert result.B.shape == (m, keep)
    assert result.A.shape == (keep, n)
    assert 0.0 <= error <= 1.0
    scale = np.linalg.norm(total.B) * np.linalg.norm(total.A)
    measured = np.linalg.norm(result.dense() - total.dense())
    assert abs(measured - error * np.linalg.norm(total.dense())) <= 1e-12 * scale


@settings(max_examples=60, deadline=None)
@given(m=dimension, n=dimension, rank=st.integers(1, 6), seed=st.integers(0, 2**32 - 1))
def test_align_never_changes_the_update(m: int, n: int, rank: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    update, reference = random_update(m, n, rank, 0.5, rng), random_update(m, n, rank, 1.0, rng)
    assert np.allclose(align(update, reference).dense(), update.dense(), rtol=1e-9, atol=1e-9)
