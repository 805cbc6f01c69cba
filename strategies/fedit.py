"""`FedIT`: the mean of A and the mean of B, each by itself."""

from typing import Literal

import torch

from strategies.adapter import PUBLISHED, Adapter, Errors, Factors, equal, factors_of, tensors_of
from strategies.fold import Mean
from strategies.lowrank import LowRank, concat, norm
from strategies.strategy import LoraStrategy
from umbel.errors import AdapterError


class FedIT(LoraStrategy):
    """Ā = Σ p_i A_i, B̄ = Σ p_i B_i (FedIT in Shepherd, arXiv 2305.05644): cheap, and the baseline in the literature.

    Not exact: Σ p_i B_i A_i − B̄ Ā = Σ p_i (B_i − B̄)(A_i − Ā), which is small while sites stay near each other, and
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
    """The `Mean` of rules that average factors: running sums of the changes of A and of B, in float64.

    `exact`: the product of the means is the mean of the products, because the sites share one of the factors; so the
    certificate is what rounding to the published dtype loses.
    """

    def __init__(self, parent: Adapter, *, exact: bool = False) -> None:
        self._parent = parent.factors
        self._exact = exact
        self._sums: dict[str, LowRank] = {}

    def add(self, update: Factors, received: Adapter, amount: float) -> None:
        """Add `amount` times the change of each factor."""
        for module, trained in update.items():
            start = received.factors[module]
            b, a = (amount * (new.double() - old) for new, old in ((trained.B, start.B), (trained.A, start.A)))
            held = self._sums.get(module)
            self._sums[module] = LowRank(b, a) if held is None else LowRank(held.B + b, held.A + a)

    def finish(self, total: float) -> tuple[Factors, dict[str, Errors]]:
        """Return the parent's factors, moved by the mean changes, as they are published, and their errors."""
        exact: dict[str, LowRank] = {}
        for module, parent in self._parent.items():
            start, moved = parent.to("cpu", torch.float64), self._sums.pop(module, None)
            exact[module] = start if moved is None else LowRank(start.B + moved.B / total, start.A + moved.A / total)
        published = factors_of(tensors_of(exact, PUBLISHED))
        if not self._exact:
            return published, {}
        return published, {
            module: Errors.of(
                float(norm(_apart(published[module], mean))), float(norm(mean)),
                float(norm(_apart(mean, self._parent[module]))),
            )
            for module, mean in exact.items()
        }  # fmt: skip


def _apart(one: LowRank, other: LowRank) -> LowRank:
    """Return ΔW − ΔW_other of two updates in one gauge, B A − B' A' = (B − B') A + B' (A − A'): nothing cancels."""
    b, a, other = one.B.double(), one.A.double(), other.to("cpu", torch.float64)
    return concat([LowRank(b - other.B, a), LowRank(other.B, a - other.A)])


def require_frozen(update: Factors, received: Adapter, factor: Literal["A", "B"]) -> None:
    """Raise AdapterError unless every module's `factor` equals exactly the one that the site received."""
    for module, trained in update.items():
        if not equal(getattr(trained, factor), getattr(received.factors[module], factor)):
            raise AdapterError(f"{module}.lora_{factor} was changed, and in this round only the other factor may be")
