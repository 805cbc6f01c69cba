"""Robust means as weights [N] on the changes of N sites, computed from their product-space Gram matrix G [N, N] alone.

B R⁻¹ · R A = B A for every invertible R, so a distance between factors means nothing: in a Krum on factors, three
colluding sites out of ten that flip the sign of their update get the *best* scores. G_ij = ⟨Δ_i, Δ_j⟩_F of the weight
changes does not depend on R. A count of tokens is a site's own claim, so these rules ignore it: `prior` [N] holds each
site's weight by lateness only.
"""

import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from umbel.errors import AdapterError

CLIP_FROM = 3
"""Smallest number of sites for clipping: among two, neither can be called the outlier."""


def norm_bound(norms: Sequence[float], clip: float, missing: int = 0) -> float:
    """Return the bound on ‖Δ‖_F, to which longer changes are shortened: `clip` times the median norm.

    Sites that changed nothing do not count for the median. With `missing` sites that may still answer, it is the
    smallest bound that their answers can lead to. Infinity for fewer than CLIP_FROM sites.
    """
    moved = [norm for norm in norms if norm > 0]
    if len(norms) + missing < CLIP_FROM or not moved:
        return math.inf
    return clip * statistics.median([0.0] * missing + moved)


def geometric_median(gram: Tensor, prior: Tensor, *, iterations: int = 200) -> Tensor:
    """Return weights w [N] for which Σ w_i Δ_i = argmin_z Σ prior_i ‖Δ_i − z‖; withstands less than half of the sites.

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
    """Return weights [N], and index → reason for each update that was not chosen.

    Chosen are the N − byzantine updates with the smallest Σ ‖Δ_i − Δ_j‖² to their N − byzantine − 2 nearest others
    (Blanchard et al., NeurIPS 2017). Raises AdapterError unless N ≥ 2 · byzantine + 3.
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
    """Return weights [N], and index → reason for each update without trust; `trusted` is the trusted site's index.

    Trust is ReLU(cos(Δ_i, Δ_trusted)), and each change is scaled to the length of the trusted one (FLTrust, arXiv
    2012.13995). The trusted update takes part itself, with trust 1: it was trained on a site's real data, and not on a
    small sample at the server.
    """
    lengths = gram.diagonal().clamp(min=0.0).sqrt()
    both = lengths * lengths[trusted]
    alike = torch.where(both > 0, gram[trusted] / both, 0.0)
    trust = prior * alike.clamp(min=0.0)
    if float(trust.sum()) == 0.0:  # the trusted site changed nothing, so the round changes nothing
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
