"""FedSA-LoRA: A is shared and averaged, B stays where it was trained."""

import torch

from strategies.adapter import Adapter, Factors
from strategies.base import LoraStrategy, Mean
from strategies.fedit import FactorMean, require_frozen
from strategies.lowrank import LowRank
from umbel.adapter import Personal


class FedSA(LoraStrategy):
    """Ā = Σ p_i A_i, and site i serves ΔW_i = B_i Ā (FedSA-LoRA, arXiv 2410.01463): A learns what sites have in common.

    Both factors are trained, and B_i never leaves its site: an update brings the B that the site received, which is
    the first version's, zero. A version by itself therefore equals the base, and there is no mean of ΔW to be near to.
    A change is measured in A (‖A_i − A‖), all that is shared: measured in ΔW, with B = 0, every change would be zero.
    """

    name = "fedsa"
    refuses = LoraStrategy.refuses | {
        "server_momentum": "it is taken on weight updates, and without the B that stay at the sites these are zero; "
        "use strategy = 'dual'"
    }

    @property
    def personal(self) -> Personal:
        return Personal(part="B")

    def mean(self, parent: Adapter) -> Mean:
        return FactorMean(parent)

    def require(self, update: Factors, received: Adapter) -> None:
        require_frozen(update, received, "B")

    def measured(self, update: LowRank) -> LowRank:
        return LowRank(torch.eye(update.rank, dtype=update.A.dtype), update.A)
