"""`LowRank`: a weight update kept as a product of two factors, and arithmetic on it that never forms an m×n matrix.

Shapes: m out features, n in features, r rank, R summed rank; `…` are batch dimensions, so that layers of one shape can
go through together. Factors may have any float dtype and be on any device; steps that decide the accuracy are done in
float64. Pure functions, no I/O.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Method = Literal["qr", "gram"]

CACHED = 4096
"""Columns of a factor that are multiplied at a time, so that they stay in the CPU's cache."""

NEAR = 1e-5
"""A difference below this share of the length is not left to a Gram matrix, whose rounding error is 1e-8 of it."""

# A singular value below this share of the largest is rounding error: float64's for QR, its square root for the Gram.
_FLOOR: dict[Method, float] = {"qr": 1e-14, "gram": 1e-7}


@dataclass(frozen=True, eq=False)
class LowRank:
    """The update of one linear layer, ΔW = scale · B A: B […, m, r], A […, r, n]; `scale` is LoRA's alpha / r.

    LoRA: arXiv 2106.09685, equation 3. Raises ValueError when B and A have no common rank.

    >>> update = LowRank(B=torch.randn(64, 8), A=torch.randn(8, 32), scale=2.0)
    >>> update.rank, update.shape
    (8, (64, 32))
    >>> mean = weighted_sum([update, update], [0.5, 0.5])  # exact, at rank 16
    >>> best, error = truncate(mean, 8)  # rank 8 again
    """

    B: Tensor
    A: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.B.ndim < 2 or self.A.ndim < 2 or self.B.shape[-1] != self.A.shape[-2]:
            raise ValueError(
                f"B {list(self.B.shape)} and A {list(self.A.shape)} have no common rank; expected [m, r] and [r, n]"
            )

    @property
    def rank(self) -> int:
        """Columns of B, an upper bound of the rank of ΔW."""
        return int(self.A.shape[-2])

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n), the shape of ΔW without batch dimensions."""
        return int(self.B.shape[-2]), int(self.A.shape[-1])

    def dense(self) -> Tensor:
        """Return ΔW […, m, n] in float64; for tests."""
        return self.scale * (self.B.double() @ self.A.double())

    def canonical(self) -> "LowRank":
        """Return the same ΔW with its scale folded into B (alpha == r): SGLang applies no other scaling correctly."""
        return self if self.scale == 1.0 else LowRank(self.scale * self.B, self.A)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "LowRank":
        """Return the same update on another device, or in another dtype."""
        return LowRank(self.B.to(device, dtype), self.A.to(device, dtype), self.scale)


def concat(updates: Sequence[LowRank]) -> LowRank:
    """Return Σ ΔW_i exactly, at the summed rank R: the factors side by side, each scale folded into its B.

    The dtype is the factors' common one, at least float32. Raises ValueError for no update, or for different shapes.
    """
    if not updates:
        raise ValueError("nothing to add up: a sum of updates needs at least one")
    shapes = {update.shape for update in updates}
    if len(shapes) > 1:
        raise ValueError(f"updates of different layers cannot be added: shapes {sorted(shapes)}")
    dtype = torch.float32
    for update in updates:
        dtype = torch.promote_types(dtype, torch.promote_types(update.B.dtype, update.A.dtype))
    b = updates[0].B.new_empty(*updates[0].B.shape[:-1], sum(update.rank for update in updates), dtype=dtype)
    parts = torch.split(b, [update.rank for update in updates], dim=-1)
    for part, update in zip(parts, updates, strict=True):
        torch.mul(update.B.to(dtype), update.scale, out=part)
    return LowRank(b, torch.cat([update.A.to(dtype) for update in updates], dim=-2))


def weighted_sum(updates: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Return Σ w_i ΔW_i exactly, at the summed rank R; ranks and scales may differ, weights may be negative.

    Raises ValueError for no update, for different shapes, or for another number of weights.
    """
    return concat([replace(u, scale=w * u.scale) for u, w in zip(updates, weights, strict=True)])


def truncate(update: LowRank, rank: int, method: Method = "qr") -> tuple[LowRank, Tensor]:
    """Return the best approximation of ΔW at a rank (Eckart–Young), and its relative Frobenius error […], float64.

    The result has exactly this rank, padded with zeros where ΔW has less; its factors are balanced (B = U √S,
    A = √S Vᵀ), its scale is 1. Raises ValueError for a rank below 1. O((m + n) R² + R³), as in FLoRIST (arXiv
    2506.09199): `qr` takes two thin QRs and the SVD of an R×R core, accurate to float64; `gram` two R×R Grams and their
    eigenvectors, several times faster and accurate to about 1e-7.

    >>> total = concat([LowRank(torch.randn(64, 8), torch.randn(8, 32)) for _ in range(3)])
    >>> best, error = truncate(total, 8)
    >>> best.rank, bool(0 <= error <= 1)
    (8, True)
    """
    if rank < 1:
        raise ValueError(f"cannot truncate to rank {rank}; a LoRA adapter has at least rank 1")
    decompose = _svd_gram if method == "gram" and update.rank < min(update.shape) else _svd_qr
    singular, factors = decompose(update)
    total = torch.linalg.vector_norm(singular, dim=-1)
    kept = min(rank, singular.shape[-1])
    singular = torch.where(singular > _FLOOR[method] * singular[..., :1], singular, 0.0)
    b, a = factors(singular, kept)
    if kept < rank:
        b = torch.nn.functional.pad(b, (0, rank - kept))
        a = torch.nn.functional.pad(a, (0, 0, 0, rank - kept))
    tail = torch.linalg.vector_norm(singular[..., kept:], dim=-1)
    return LowRank(b, a), torch.where(total > 0, tail / total, 0.0)


class _QR:
    """Thin factors of ΔW = left · diag(S) · right; calling it with S returns the first k balanced columns and rows."""

    def __init__(self, left: Tensor, right: Tensor, dtype: torch.dtype) -> None:
        self.left, self.right, self.dtype = left, right, dtype

    def __call__(self, singular: Tensor, k: int) -> tuple[Tensor, Tensor]:
        root = singular[..., :k].sqrt()
        b = self.left[..., :k] * root[..., None, :]
        return b.to(self.dtype), (root[..., None] * self.right[..., :k, :]).to(self.dtype)


def _svd_qr(update: LowRank) -> tuple[Tensor, _QR]:
    """Return S […, k] of ΔW, k = min(R, m, n), and its singular vectors; by a dense SVD where R makes that cheaper."""
    b, a, dtype = update.B.double() * update.scale, update.A.double(), _kept(update)
    if update.rank >= min(update.shape):
        u, s, vt = torch.linalg.svd(b @ a, full_matrices=False)
        return s, _QR(u, vt, dtype)
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.mT)
    u, s, vt = torch.linalg.svd(r_b @ r_a.mT)
    return s, _QR(q_b @ u, vt @ q_a.mT, dtype)


class _Gram:
    """Singular vectors of ΔW from its Grams; calling it with S returns the first k balanced columns and rows.

    With A Aᵀ = L Lᵀ and Lᵀ (BᵀB) L = V S² Vᵀ, the scale folded into B, they are B L V S⁻¹ and S⁻² Vᵀ Lᵀ (BᵀB) A.
    """

    def __init__(self, update: LowRank, to_b: Tensor, to_a: Tensor) -> None:
        self.update, self.to_b, self.to_a = update, to_b, to_a

    def __call__(self, singular: Tensor, k: int) -> tuple[Tensor, Tensor]:
        s = singular[..., :k]
        inverse = torch.where(s > 0, 1.0 / s, 0.0).sqrt()
        dtype = _kept(self.update)
        b = self.update.B.to(dtype) @ (self.to_b[..., :k] * inverse[..., None, :] * self.update.scale).to(dtype)
        return b, (inverse[..., None] ** 3 * self.to_a[..., :k, :]).to(dtype) @ self.update.A.to(dtype)


def _svd_gram(update: LowRank) -> tuple[Tensor, _Gram]:
    """Return S […, R] of ΔW, and its singular vectors, from the R×R Grams of its factors."""
    of_b, of_a = _inner(update.B.mT) * update.scale**2, _inner(update.A)
    root = _root(of_a)
    through = root.mT @ of_b
    squares, v = torch.linalg.eigh(through @ root)
    v = v.flip(-1)
    return squares.flip(-1).clamp(min=0.0).sqrt(), _Gram(update, root @ v, v.mT @ through)


def _root(square: Tensor) -> Tensor:
    """Return L with L Lᵀ = G for a positive semidefinite G; by Cholesky where it succeeds: it is ten times faster."""
    lower, failed = torch.linalg.cholesky_ex(square)
    if bool((failed != 0).any()):
        values, vectors = torch.linalg.eigh(square)
        lower = vectors * values.clamp(min=0.0).sqrt()[..., None, :]
    root: Tensor = lower
    return root


def _inner(rows: Tensor) -> Tensor:
    """Return X Xᵀ in float64; on a CPU by numpy, which computes only half of it (BLAS' syrk), unlike torch."""
    if rows.device.type != "cpu":
        x = rows.double()
        return x @ x.mT
    total = torch.zeros(*rows.shape[:-1], rows.shape[-2], dtype=torch.float64)
    for columns in torch.split(rows, CACHED, dim=-1):
        array = columns.double().numpy()
        total += torch.from_numpy(array @ array.swapaxes(-1, -2))
    return total


def _kept(update: LowRank) -> torch.dtype:
    """Return the dtype of results: float64 for float64 factors, float32 for any smaller one."""
    return torch.promote_types(torch.float32, torch.promote_types(update.B.dtype, update.A.dtype))


def norm(update: LowRank) -> Tensor:
    """Return ‖ΔW‖_F […], float64, by ‖ΔW‖² = s² tr((BᵀB)(A Aᵀ))."""
    square = (_inner(update.B.mT) * _inner(update.A)).sum((-1, -2))
    return abs(update.scale) * square.clamp(min=0.0).sqrt()


def gram(adapters: Sequence[Mapping[str, LowRank]]) -> Tensor:
    """Return G [N, N] of whole adapters, float64: G_ij = Σ over layers of ⟨ΔW_i, ΔW_j⟩_F, for any ranks and gauges.

    It goes layer by layer, so that adapters which are read from disk by layer are never in memory whole.
    """
    total = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    for module in adapters[0] if adapters else ():
        updates = [adapter[module] for adapter in adapters]
        side_by_side = concat(updates)
        products = (_inner(side_by_side.B.mT) * _inner(side_by_side.A)).cpu()
        owner = torch.repeat_interleave(torch.arange(len(updates)), torch.tensor([update.rank for update in updates]))
        member = torch.nn.functional.one_hot(owner, len(updates)).double()
        total += member.mT @ products @ member
    return total


def distances(made: LowRank, exact: LowRank, start: LowRank) -> tuple[float, float, float]:
    """Return ‖made − exact‖, ‖exact‖ and ‖exact − start‖ (Frobenius), each right to some 1e-9 of ‖exact‖ and better.

    By one Gram in float64. What is nearer than its rounding error allows is computed anew, by QR.
    """
    made, exact, start = (LowRank(one.B.double(), one.A.double(), one.scale) for one in (made, exact, start))
    products = gram([{"": made}, {"": exact}, {"": start}])
    size = math.sqrt(max(0.0, float(products[1, 1])))

    def apart(one: LowRank, other: LowRank, i: int, j: int) -> float:
        square = float(products[i, i] + products[j, j] - 2 * products[i, j])
        if square > NEAR**2 * float(products[1, 1]):
            return math.sqrt(square)
        difference = weighted_sum([one, other], [1.0, -1.0])
        r_b, r_a = (torch.linalg.qr(factor, mode="r").R for factor in (difference.B, difference.A.mT))
        return float(torch.linalg.matrix_norm(r_b @ r_a.mT))

    return apart(made, exact, 0, 1), size, apart(exact, start, 1, 2)


def align(update: LowRank, reference: LowRank) -> LowRank:
    """Return the same ΔW with its factors rotated as near to the reference's as a rotation can bring them.

    An SVD leaves sign and rotation of the factors arbitrary. Factors that stay near the previous round's keep values
    that are stored per factor (an optimizer's moments, FedIT's mean) meaningful. Orthogonal Procrustes:
    R = argmin ‖B R − B_ref‖² + ‖Rᵀ A − A_ref‖² = U Vᵀ of svd(Bᵀ B_ref + A A_refᵀ), as FedRot-LoRA (arXiv 2602.23638).
    Raises ValueError when rank or shape differ.
    """
    if update.rank != reference.rank or update.shape != reference.shape:
        raise ValueError(
            f"cannot align rank {update.rank}, shape {update.shape} to rank {reference.rank}, shape {reference.shape}"
        )
    dtype = _kept(update)
    cross = update.B.to(dtype).mT @ reference.B.to(dtype) + update.A.to(dtype) @ reference.A.to(dtype).mT
    u, _, vt = torch.linalg.svd(cross.double())
    rotation = (u @ vt).to(dtype)
    return LowRank(update.B.to(dtype) @ rotation, rotation.mT @ update.A.to(dtype), update.scale)


def wake(update: LowRank, reference: LowRank) -> LowRank:
    """Return the same ΔW; where a column of B and its row of A are both zero, A gets the reference's row, if it exists.

    Such a pair gets no gradient, so that rank could never be trained again.
    """
    rows = min(update.rank, reference.rank)
    asleep = (update.A == 0).all(-1)[..., :rows]
    if not bool(asleep.any()):
        return update
    asleep &= (update.B == 0).all(-2)[..., :rows]
    a = update.A.clone()
    a[..., :rows, :] = torch.where(asleep[..., None], reference.A[..., :rows, :].to(a.dtype), a[..., :rows, :])
    return LowRank(update.B, a, update.scale)
