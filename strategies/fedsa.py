"""`FedSA`: A is shared and averaged, each site's B stays there."""

import torch

from strategies.adapter import Adapter, Factors
from strategies.fedit import FactorMean, require_frozen
from strategies.fold import Mean
from strategies.lowrank import LowRank
from strategies.strategy import LoraStrategy
from umbel.adapter import Personal


class FedSA(LoraStrategy):
    """Ā = Σ p_i A_i, and site i serves ΔW_i = B_i Ā (FedSA-LoRA, arXiv 2410.01463): A is the knowledge in common.

    Both factors are trained, and B_i never leaves its site: an update carries the B that the site received, the first
    version's, which is zero. A version by itself therefore equals the base, and there is no mean of ΔW to compare with.
    A change is measured in A (‖A_i − A‖), the shared part: measured in ΔW, with B = 0, every change would be zero.
    """

    name = "fedsa"
    refuses = LoraStrategy.refuses | {
        "server_momentum": "it is taken on weight updates, and without the B that stay at the sites these are zero; "
        "use strategy = 'dual'"
    }

    @property
    def personal(self) -> Personal:
        """Factor B of each site."""
        return Personal(part="B")

    def mean(self, parent: Adapter) -> Mean:
        return FactorMean(parent)

    def require(self, update: Factors, received: Adapter) -> None:
        require_frozen(update, received, "B")

    def measured(self, update: LowRank) -> LowRank:
        """Return I · A, so that norms and products of changes are those of A alone."""
        return LowRank(torch.eye(update.rank, dtype=update.A.dtype), update.A)
