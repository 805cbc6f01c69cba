"""Robust means as weights [N] on the changes of N sites, computed from their product-space Gram matrix G [N, N] alone.

B R⁻¹ · R A = B A for every invertible R, so a distance between factors means nothing: in a Krum on factors, three
colluding sites out of ten that flip the sign of their update get the *best* scores. G_ij = ⟨Δ_i, Δ_j⟩_F of the weight
changes does not depend on R. Every update counts as one. How much data a site has is its own claim; and if late updates
counted for less, a minority of hostile sites that are in time would be a majority of the weight.
"""

import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from umbel.errors import AdapterError

CLIP_FROM = 3
"""Smallest number of sites for clipping: among two, neither can be called the outlier."""
TIE = 1e-12
"""Relative difference of squared lengths below which it is rounding error."""


def norm_bound(norms: Sequence[float], clip: float, missing: int = 0) -> float:
    """Return the bound on ‖Δ‖_F, to which longer changes are shortened: `clip` times the median norm.

    Sites that changed nothing do not count for the median. With `missing` sites that may still answer, it is the
    smallest bound that their answers can lead to. Infinity for fewer than CLIP_FROM sites.
    """
    moved = [norm for norm in norms if norm > 0]
    if len(norms) + missing < CLIP_FROM or not moved:
        return math.inf
    return clip * statistics.median([0.0] * missing + moved)


def geometric_median(gram: Tensor, *, iterations: int = 200) -> Tensor:
    """Return weights w [N] for which Σ w_i Δ_i = argmin_z Σ ‖Δ_i − z‖.

    RFA's smoothed Weiszfeld (arXiv 1912.13445, Algorithm 2) on weights: ‖Δ_i − Σ w Δ‖² = G_ii − 2 (G w)_i + wᵀ G w.
    Where a share α < ½ of the sites is hostile, the result is at most (1 − α) / √(1 − 2α) times as far from any point z
    as the farthest honest Δ_i is from it (Minsker, Bernoulli 21(4), 2015, Lemma 2.1). So it is bounded, not right.
    """
    weights = torch.full((len(gram),), 1 / len(gram), dtype=torch.float64)
    for _ in range(iterations):
        through = gram @ weights
        square = gram.diagonal() - 2 * through + weights @ through
        distance = square.clamp(min=0.0).sqrt()
        closer = 1 / distance.clamp(min=1e-6 * float(distance.max()) + 1e-300)
        closer = closer / closer.sum()
        if float((closer - weights).abs().max()) < 1e-9:
            return closer
        weights = closer
    return weights


def multi_krum(gram: Tensor, byzantine: int) -> tuple[Tensor, dict[int, str]]:
    """Return weights [N], and index → reason for each update that was not chosen.

    Chosen are the N − byzantine updates with the smallest Σ ‖Δ_i − Δ_j‖² to their N − byzantine − 2 nearest others
    (Blanchard et al., NeurIPS 2017); of updates with the same score the first ones. Raises AdapterError unless
    N ≥ 2 · byzantine + 3.
    """
    count = len(gram)
    if count < 2 * byzantine + 3:
        raise AdapterError(
            f"multi_krum against {byzantine} hostile sites needs {2 * byzantine + 3} updates, not {count}"
        )
    square = gram.diagonal()
    both = square[:, None] + square[None, :]
    apart = torch.where(both - 2 * gram > TIE * both, both - 2 * gram, 0.0)
    scores = apart.fill_diagonal_(math.inf).sort(dim=1).values[:, : count - byzantine - 2].sum(1)
    chosen = scores.argsort(stable=True)[: count - byzantine].tolist()
    weights = torch.zeros(count, dtype=torch.float64)
    weights[chosen] = 1 / len(chosen)
    worst = float(scores[chosen].max())
    far = {index: _how_far(float(scores[index]), worst) for index in range(count) if index not in chosen}
    return weights, far


def fltrust(gram: Tensor, trusted: int) -> tuple[Tensor, dict[int, str]]:
    """Return weights [N], and index → reason for each update without trust; `trusted` is the trusted site's index.

    Trust is ReLU(cos(Δ_i, Δ_trusted)), and each change is scaled to the length of the trusted one (FLTrust, arXiv
    2012.13995). The trusted update takes part itself, with trust 1: it was trained on a site's real data, and not on a
    small sample at the server.
    """
    lengths = gram.diagonal().clamp(min=0.0).sqrt()
    both = lengths * lengths[trusted]
    alike = torch.where(both > 0, gram[trusted] / both, 0.0)
    trust = alike.clamp(min=0.0)
    if float(trust.sum()) == 0.0:  # the trusted site changed nothing, so the round changes nothing
        return torch.zeros_like(trust), {}
    weights = trust / trust.sum() * torch.where(lengths > 0, lengths[trusted] / lengths, 0.0)
    strangers = {
        index: f"fltrust: its change points away from the trusted site's (cosine {float(alike[index]):.2f})"
        if float(lengths[index])
        else "fltrust: it changed nothing, so its change points nowhere"
        for index in range(len(gram))
        if float(trust[index]) == 0.0
    }
    return weights, strangers


def _how_far(score: float, worst: float) -> str:
    """Say how an update that was not chosen compares with the last one that was, by their sums of squares."""
    if math.isclose(score, worst, rel_tol=TIE):
        return "multi_krum: a tie: it lies as near to the others as an update chosen, and its site's name comes later"
    if worst == 0.0:
        return "multi_krum: the updates chosen are all the same, and it is another one"
    return f"multi_krum: it lies {math.sqrt(score / worst):.3g} times as far from the others as any update chosen"
