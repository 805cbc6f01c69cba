"""Exact low-rank arithmetic against dense float64 algebra."""

import doctest

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies import lowrank
from strategies.lowrank import LowRank, align, concat, gram, norm, truncate, wake, weighted_sum
from tests.toys.adapters import distance, random_update, rotated


def test_weighted_sum_of_mixed_ranks_and_scales_is_exact_when_the_rank_suffices() -> None:
    """Algebra: Σ w_i s_i B_i A_i has rank at most Σ r_i."""
    updates = [random_update(70, 60, rank, 2.0 / rank, seed=rank) for rank in (4, 8, 16, 9, 2)]
    weights = [0.1, 0.3, 0.2, 0.25, 0.15]
    dense = sum(w * u.dense() for w, u in zip(weights, updates, strict=True))
    result, error = truncate(weighted_sum(updates, weights), 39)
    assert distance(result.dense(), dense) < 1e-12
    assert error < 1e-12


def test_float32_factors_give_the_float64_mean_to_1e_5() -> None:
    """Sites send float32 at most."""
    updates = [random_update(70, 60, rank, 1.0, seed=rank).to("cpu", torch.float32) for rank in (4, 8, 16)]
    dense = sum(update.dense() for update in updates) / 3
    for method in ("qr", "gram"):
        result, error = truncate(weighted_sum(updates, [1 / 3] * 3), 28, method=method)
        assert result.A.dtype is torch.float32
        assert distance(result.dense(), dense) < 1e-6
        assert error < 1e-6


@pytest.mark.parametrize("ranks", [(4, 8, 6), (30, 30, 30)], ids=["thin", "dense fallback"])
@pytest.mark.parametrize("method", ["qr", "gram"])
def test_truncation_error_is_eckart_young_and_equals_the_certificate(ranks: tuple[int, ...], method: str) -> None:
    """Eckart and Young, 1936: no rank-5 matrix is nearer than the singular tail."""
    total = concat([random_update(50, 40, rank, seed=seed) for seed, rank in enumerate(ranks)])
    result, error = truncate(total, 5, method=method)
    singular = np.linalg.svd(total.dense().numpy(), compute_uv=False)
    tail = float(np.linalg.norm(singular[5:]) / np.linalg.norm(singular))
    assert abs(distance(result.dense(), total.dense()) - tail) < 1e-10
    assert abs(float(error) - tail) < 1e-10


def test_gram_agrees_with_qr() -> None:
    """Two routes to one optimum; the Gram squares the condition number, so it may be worse by about 1e-7."""
    total = concat([random_update(90, 70, 8, seed=seed).to("cpu", torch.float32) for seed in range(4)])
    by_qr, by_gram = truncate(total, 8)[0], truncate(total, 8, method="gram")[0]
    assert distance(by_gram.dense(), by_qr.dense()) < 1e-5


@pytest.mark.parametrize("method", ["qr", "gram"])
def test_a_batch_is_its_members(method: str) -> None:
    members = [random_update(20, 15, 6, 0.5, seed=seed) for seed in range(3)]
    folded = [member.canonical() for member in members]
    batch = LowRank(torch.stack([one.B for one in folded]), torch.stack([one.A for one in folded]))
    together, errors = truncate(batch, 2, method=method)
    assert errors.shape == (3,)
    for index, member in enumerate(members):
        alone, error = truncate(member, 2, method=method)
        assert distance((together.B[index] @ together.A[index]), alone.dense()) < 1e-9
        assert abs(float(errors[index] - error)) < 1e-9
    assert torch.allclose(norm(batch), torch.stack([norm(member) for member in members]))


def test_gram_of_adapters_is_that_of_their_dense_updates() -> None:
    """⟨ΔW_i, ΔW_j⟩_F = Σ (B_iᵀ B_j) ∘ (A_i A_jᵀ), summed over layers; ranks differ."""
    adapters = [
        {"q": random_update(20, 15, rank, 0.5, seed=rank), "v": random_update(8, 15, rank + 1, seed=rank + 50)}
        for rank in (2, 3, 5)
    ]
    flat = [torch.cat([update.dense().flatten() for update in adapter.values()]) for adapter in adapters]
    assert torch.allclose(gram(adapters), torch.stack(flat) @ torch.stack(flat).T, rtol=1e-12)
    assert gram([]).shape == (0, 0)
    one = adapters[0]["q"]
    assert float(norm(one)) == pytest.approx(float(torch.linalg.norm(one.dense())), rel=1e-12)


def test_fedit_error_identity_for_two_sites() -> None:
    """Derived: Σ p_i B_i A_i − B̄ Ā = ¼ (B_1 − B_2)(A_1 − A_2) for two sites of one half each."""
    one, two = random_update(30, 20, 4, seed=1), random_update(30, 20, 4, seed=2)
    exact = weighted_sum([one, two], [0.5, 0.5]).dense()
    fedit = LowRank((one.B + two.B) / 2, (one.A + two.A) / 2).dense()
    identity = 0.25 * (one.B - two.B) @ (one.A - two.A)
    assert float((exact - fedit - identity).abs().max()) < 1e-12


def test_ranks_of_the_mean_and_of_fedits_residual() -> None:
    """The exact mean of N sites has rank N r, FedEx-LoRA's residual (N − 1) r (arXiv 2410.09432)."""
    updates = [random_update(48, 48, 4, seed=seed) for seed in range(5)]
    exact = weighted_sum(updates, [0.2] * 5).dense()
    means = LowRank(sum(u.B for u in updates) / 5, sum(u.A for u in updates) / 5)
    assert torch.linalg.matrix_rank(exact) == 20
    assert torch.linalg.matrix_rank(exact - means.dense()) == 16


def test_align_keeps_the_update_and_brings_rotated_factors_back() -> None:
    """Orthogonal Procrustes, as FedRot-LoRA (arXiv 2602.23638)."""
    update = truncate(random_update(40, 30, 6), 6)[0]
    rotation = torch.linalg.qr(random_update(6, 6, 6, seed=3).B).Q
    back = align(LowRank(update.B @ rotation, rotation.mT @ update.A), update)
    assert distance(back.B, update.B) < 1e-10
    assert distance(back.A, update.A) < 1e-10


def test_wake_gives_an_empty_rank_a_row_to_be_trained_from() -> None:
    reference = random_update(9, 7, 3, seed=5)
    short = truncate(random_update(9, 7, 2, seed=6), 3)[0]
    woken = wake(short, reference)
    assert torch.equal(woken.dense(), short.dense())
    assert torch.equal(woken.A[2], reference.A[2])
    assert torch.equal(woken.A[:2], short.A[:2])


def test_canonical_folds_the_scale() -> None:
    update = random_update(5, 4, 2, 0.25)
    assert update.canonical().scale == 1.0
    assert torch.allclose(update.canonical().dense(), update.dense())


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="no common rank"):
        LowRank(torch.zeros(3, 2), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="different layers"):
        concat([random_update(4, 3, 1), random_update(3, 4, 1)])
    with pytest.raises(ValueError, match="rank 0"):
        truncate(random_update(4, 3, 1), 0)
    with pytest.raises(ValueError, match="cannot align"):
        align(random_update(4, 3, 1), random_update(4, 3, 2))


def test_the_examples_in_the_docstrings_are_true() -> None:
    assert doctest.testmod(lowrank, extraglobs={"torch": torch}) == doctest.TestResults(failed=0, attempted=7)


dimension = st.integers(1, 12)
seeds = st.integers(0, 2**31 - 1)


@settings(max_examples=60, deadline=None)
@given(m=dimension, n=dimension, ranks=st.lists(st.integers(1, 9), min_size=1, max_size=4), keep=st.integers(1, 14),
       seed=seeds, method=st.sampled_from(["qr", "gram"]))  # fmt: skip
def test_truncation_is_never_worse_than_its_certificate(
    m: int, n: int, ranks: list[int], keep: int, seed: int, method: str
) -> None:
    total = concat([random_update(m, n, rank, seed=seed + rank) for rank in ranks])
    result, error = truncate(total, keep, method=method)
    assert result.B.shape == (m, keep)
    assert result.A.shape == (keep, n)
    assert 0.0 <= error <= 1.0
    scale = float(torch.linalg.norm(total.B) * torch.linalg.norm(total.A))
    measured = float(torch.linalg.norm(result.dense() - total.dense()))
    allowed = 1e-12 if method == "qr" else 1e-6
    assert abs(measured - float(error) * float(torch.linalg.norm(total.dense()))) <= allowed * scale


@settings(max_examples=60, deadline=None)
@given(m=dimension, n=dimension, rank=st.integers(1, 6), seed=seeds)
def test_align_never_changes_the_update(m: int, n: int, rank: int, seed: int) -> None:
    update, reference = random_update(m, n, rank, 0.5, seed=seed), random_update(m, n, rank, seed=seed + 1)
    assert torch.allclose(align(update, reference).dense(), update.dense(), rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(m=dimension, n=dimension, rank=st.integers(1, 6), seed=seeds)
def test_norms_and_truncations_do_not_depend_on_the_gauge(m: int, n: int, rank: int, seed: int) -> None:
    update = random_update(m, n, rank, seed=seed)
    other = rotated(update, seed=seed)
    assert float(norm(other)) == pytest.approx(float(norm(update)), rel=1e-8)
    best, again = truncate(update, rank)[0].dense(), truncate(other, rank)[0].dense()
    assert torch.allclose(best, again, rtol=1e-7, atol=1e-7 * float(norm(update)))
