"""FedIT: the mean of A and the mean of B."""

from typing import Literal

import torch

from strategies.adapter import Adapter, Factors
from strategies.base import LoraStrategy, Mean
from strategies.lowrank import LowRank
from umbel.errors import AdapterError


class FedIT(LoraStrategy):
    """Ā = Σ p_i A_i, B̄ = Σ p_i B_i (Shepherd, arXiv 2305.05644): cheap, and the baseline in the literature.

    Not exact: Σ p_i B_i A_i − B̄ Ā = Σ p_i (B_i − B̄)(A_i − Ā), which is small while sites stay near each other and
    zero when they share a factor.
    """

    name = "fedit"
    refuses = LoraStrategy.refuses | {
        "server_momentum": "the factors of two rounds are not aligned, so a sum of their differences means nothing; "
        "use strategy = 'exact', whose momentum is taken on the weight updates"
    }

    def mean(self, parent: Adapter) -> Mean:
        return FactorMean(parent)


class FactorMean:
    """Running sums of what was changed in A and in B, each for itself, in float64."""

    def __init__(self, parent: Adapter, *, exact: bool = False) -> None:
        self._parent = parent.factors
        self._exact = exact
        self._sums: dict[str, LowRank] = {}

    def add(self, update: Factors, received: Adapter, amount: float) -> None:
        for module, now in update.items():
            before = received.factors[module]
            b, a = (amount * (new.double() - old) for new, old in ((now.B, before.B), (now.A, before.A)))
            held = self._sums.get(module)
            self._sums[module] = LowRank(b, a) if held is None else LowRank(held.B + b, held.A + a)

    def finish(self, total: float) -> tuple[Factors, dict[str, float]]:
        combined: dict[str, LowRank] = {}
        for module, parent in self._parent.items():
            moved = self._sums.pop(module, None)
            if moved is not None:
                parent = LowRank(parent.B + moved.B / total, parent.A + moved.A / total)
            combined[module] = parent
        return combined, dict.fromkeys(combined, 0.0) if self._exact else {}


def require_frozen(update: Factors, received: Adapter, factor: Literal["A", "B"]) -> None:
    """Raise AdapterError unless a factor is, to the bit, the one that the site received."""
    for module, now in update.items():
        before = received.factors[module]
        if not torch.equal(getattr(now, factor), getattr(before, factor)):
            raise AdapterError(f"{module}.lora_{factor} was changed, and in this round only the other factor may be")
