"""Exact: the mean of the sites' weight updates themselves, not of their factors."""

import numpy as np

from strategies.base import Factors, LoraStrategy
from strategies.lowrank import LowRank, align, truncate, weighted_sum


class Exact(LoraStrategy):
    """G' = G + Σ p_i (ΔW_i − G), at the parent's rank, with the error of that truncation per module.

    The mean is taken in product space, as in FlexLoRA (arXiv 2402.11505), but without forming a dense matrix. Factors
    are aligned to the parent's, so that they move as little as ΔW does.
    """

    name = "exact"

    def combine(
        self, parent: Factors, updates: dict[str, Factors], weights: dict[str, float]
    ) -> tuple[Factors, dict[str, float]]:
        combined: Factors = {}
        certificate: dict[str, float] = {}
        for module, reference in parent.items():
            trained = [updates[site][module] for site in weights]
            combined[module], certificate[module] = merge(reference, trained, list(weights.values()))
        return combined, certificate


def merge(
    parent: LowRank, trained: list[LowRank], weights: list[float], received: list[LowRank] | None = None
) -> tuple[LowRank, float]:
    """One module's G' at the parent's rank, and its relative truncation error; `weights` sum to 1.

    `received` is what each site started from, where that is not the parent itself: a truncation of it, for a site of
    smaller rank. Taking the mean over what each site *changed* then keeps what small sites never saw, where a plain
    mean of truncated updates loses rank round by round (raFLoRA, arXiv 2602.13486).
    """
    if all(_same(now, before) for now, before in zip(trained, received or [parent] * len(trained), strict=True)):
        # An SVD of ΔW = 0 would zero A as well as B, and no gradient would ever wake the module up again.
        return parent, 0.0
    if received is None:
        total = weighted_sum(trained, weights)  # G − Σ p_i G = 0
    else:
        total = weighted_sum([parent, *trained, *received], [1.0, *weights, *(-weight for weight in weights)])
    truncated, error = truncate(total, parent.rank)
    return align(truncated, parent), error


def _same(one: LowRank, other: LowRank) -> bool:
    return np.array_equal(one.A, other.A) and np.array_equal(one.B, other.B)
