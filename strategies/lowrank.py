"""Weight updates kept as low-rank products, and exact arithmetic on them that never forms an m×n matrix.

Shapes: m out features, n in features, r rank, R summed rank. Everything is float64; pure functions, no I/O.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LowRank:
    """ΔW = scale · B A, of one linear layer: B [m, r], A [r, n]. `scale` is LoRA's alpha / r."""

    B: Matrix
    A: Matrix
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.B.ndim != 2 or self.A.ndim != 2 or self.B.shape[1] != self.A.shape[0]:
            raise ValueError(f"B {self.B.shape} and A {self.A.shape} have no common rank; expected [m, r] and [r, n]")

    @property
    def rank(self) -> int:
        """Columns of B; an upper bound of the rank of ΔW."""
        return int(self.A.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of ΔW."""
        return self.B.shape[0], self.A.shape[1]

    def dense(self) -> Matrix:
        """ΔW [m, n]."""
        return self.scale * (self.B @ self.A)


def concat(updates: Sequence[LowRank]) -> LowRank:
    """Σ ΔW_i exactly, at the summed rank R: the factors side by side, each scale folded into its B."""
    if not updates:
        raise ValueError("nothing to add up: a sum of updates needs at least one")
    shapes = {update.shape for update in updates}
    if len(shapes) > 1:
        raise ValueError(f"updates of different layers cannot be added: shapes {sorted(shapes)}")
    return LowRank(
        np.concatenate([update.scale * update.B for update in updates], axis=1),
        np.concatenate([update.A for update in updates], axis=0),
    )


def weighted_sum(updates: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Σ w_i ΔW_i exactly, at the summed rank R; ranks and scales may differ, weights may be negative."""
    return concat([replace(u, scale=w * u.scale) for u, w in zip(updates, weights, strict=True)])


def truncate(update: LowRank, rank: int) -> tuple[LowRank, float]:
    """The best approximation of ΔW at `rank` (Eckart–Young), and its relative Frobenius error, exactly.

    Two thin QRs and an R×R SVD, O((m + n) R² + R³), as in FLoRIST (arXiv 2506.09199); dense only where R ≥ min(m, n)
    makes that the cheaper way. Factors are balanced (B = U √S, A = √S Vᵀ), scale 1, padded with zeros to `rank`.
    """
    if rank < 1:
        raise ValueError(f"cannot truncate to rank {rank}; a LoRA adapter has at least rank 1")
    left, singular, right = _svd(update)
    kept = min(rank, singular.size)
    root = np.sqrt(singular[:kept])
    b, a = np.zeros((update.shape[0], rank)), np.zeros((rank, update.shape[1]))
    b[:, :kept] = left[:, :kept] * root
    a[:kept] = root[:, None] * right[:kept]
    total = float(np.linalg.norm(singular))
    error = float(np.linalg.norm(singular[rank:])) / total if total else 0.0
    return LowRank(b, a), error


def _svd(update: LowRank) -> tuple[Matrix, Matrix, Matrix]:
    """U [m, k], S [k], Vᵀ [k, n] of ΔW with k = min(R, m, n)."""
    if update.rank >= min(update.shape):
        dense = np.linalg.svd(update.dense(), full_matrices=False)
        return dense.U, dense.S, dense.Vh
    q_b, r_b = np.linalg.qr(update.scale * update.B)
    q_a, r_a = np.linalg.qr(update.A.T)
    core = np.linalg.svd(r_b @ r_a.T)
    return q_b @ core.U, core.S, core.Vh @ q_a.T


def align(update: LowRank, reference: LowRank) -> LowRank:
    """The same ΔW, its factors rotated as near to the reference's as a rotation can bring them.

    An SVD leaves sign and rotation of the factors arbitrary; factors that stay near those of the round before keep
    what is stored per factor (an optimizer's moments, FedIT's mean) meaningful. Orthogonal Procrustes:
    R = argmin ‖B R − B_ref‖² + ‖Rᵀ A − A_ref‖² = U Vᵀ of svd(Bᵀ B_ref + A A_refᵀ), as FedRot-LoRA (arXiv 2602.23638).
    """
    if update.rank != reference.rank or update.shape != reference.shape:
        raise ValueError(
            f"cannot align rank {update.rank}, shape {update.shape} to rank {reference.rank}, shape {reference.shape}"
        )
    u, _, vt = np.linalg.svd(update.B.T @ reference.B + update.A @ reference.A.T)
    rotation = u @ vt
    return LowRank(update.B @ rotation, rotation.T @ update.A, update.scale)
