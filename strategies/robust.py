"""Robust means as weights on the sites' changes, computed from their product-space Gram G alone.

B R⁻¹ · R A is B A for every invertible R, so a distance between factors says nothing: three colluding sign-flippers of
ten come out *best* of a Krum on factors. G_ij = ⟨Δ_i, Δ_j⟩_F of the weight changes does not see R. A count of tokens is
a site's own claim, so under these rules it has no say: `prior` holds what lateness makes of each site.
"""

import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from umbel.errors import AdapterError

CLIP_FROM = 3
"""With fewer sites there is no telling which one is out of line."""


def norm_bound(norms: Sequence[float], clip: float, missing: int = 0) -> float:
    """The longest that a change may be, ‖Δ‖_F: `clip` times the median one. Longer ones are shortened to it.

    Sites that changed nothing are not asked how long a change is. With `missing` others that may still come, it is the
    least that this can become, whatever they send.
    """
    moved = [norm for norm in norms if norm > 0]
    if len(norms) + missing < CLIP_FROM or not moved:
        return math.inf
    return clip * statistics.median([0.0] * missing + moved)


def geometric_median(gram: Tensor, prior: Tensor, *, iterations: int = 200) -> Tensor:
    """Weights [N] of argmin_z Σ prior_i ‖Δ_i − z‖, which is Σ w_i Δ_i; withstands less than half of the sites.

    RFA's smoothed Weiszfeld (arXiv 1912.13445, Algorithm 2) on weights: ‖Δ_i − Σ w Δ‖² = G_ii − 2 (G w)_i + wᵀ G w.
    """
    prior = prior / prior.sum()
    weights = prior
    for _ in range(iterations):
        through = gram @ weights
        square = gram.diagonal() - 2 * through + weights @ through
        distance = square.clamp(min=0.0).sqrt()
        closer = prior / distance.clamp(min=1e-6 * float(distance.max()) + 1e-300)
        closer = closer / closer.sum()
        if float((closer - weights).abs().max()) < 1e-9:
            return closer
        weights = closer
    return weights


def multi_krum(gram: Tensor, prior: Tensor, byzantine: int) -> tuple[Tensor, dict[int, str]]:
    """Weights [N] and, for each update that was not chosen, why; AdapterError unless N ≥ 2 · byzantine + 3.

    The N − byzantine updates with the smallest Σ ‖Δ_i − Δ_j‖² to their N − byzantine − 2 nearest others
    (Blanchard et al., NeurIPS 2017).
    """
    count = len(prior)
    if count < 2 * byzantine + 3:
        raise AdapterError(
            f"multi_krum against {byzantine} hostile sites needs {2 * byzantine + 3} updates, not {count}"
        )
    square = gram.diagonal()
    apart = (square[:, None] + square[None, :] - 2 * gram).clamp(min=0.0)
    scores = apart.fill_diagonal_(math.inf).sort(dim=1).values[:, : count - byzantine - 2].sum(1)
    chosen = scores.argsort(stable=True)[: count - byzantine].tolist()
    weights = torch.zeros(count, dtype=torch.float64)
    weights[chosen] = prior[chosen] / prior[chosen].sum()
    worst = float(scores[chosen].max())
    far = {
        index: f"multi_krum: it lies {_times(float(scores[index]), worst)} as far from the others as any update chosen"
        for index in range(count)
        if index not in chosen
    }
    return weights, far


def fltrust(gram: Tensor, prior: Tensor, trusted: int) -> tuple[Tensor, dict[int, str]]:
    """Weights [N] and, for each update without trust, why. `trusted` is whose update the others are measured by.

    Trust is ReLU(cos(Δ_i, Δ_trusted)), and each change is brought to the trusted one's length (arXiv 2012.13995); the
    trusted update takes part with trust 1, as it was trained on real data and not on a sample of it.
    """
    lengths = gram.diagonal().clamp(min=0.0).sqrt()
    both = lengths * lengths[trusted]
    alike = torch.where(both > 0, gram[trusted] / both, 0.0)
    trust = prior * alike.clamp(min=0.0)
    if float(trust.sum()) == 0.0:  # the trusted site changed nothing, and so does the round
        return torch.zeros_like(trust), {}
    weights = trust / trust.sum() * torch.where(lengths > 0, lengths[trusted] / lengths, 0.0)
    strangers = {
        index: f"fltrust: its change points away from the trusted site's (cosine {float(alike[index]):.2f})"
        for index in range(len(prior))
        if float(trust[index]) == 0.0
    }
    return weights, strangers


def _times(score: float, worst: float) -> str:
    return f"{math.sqrt(score / worst):.2g} times" if worst > 0 else "infinitely"
