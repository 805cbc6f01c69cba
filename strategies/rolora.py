"""`RoLoRA`: odd rounds train B, even rounds train A."""

from typing import Literal

from strategies.adapter import Adapter, Factors
from strategies.fedit import FactorMean, require_frozen
from strategies.fold import Mean
from strategies.strategy import LoraStrategy
from umbel.messages import TrainPlan


class RoLoRA(LoraStrategy):
    """ΔW' = (Σ p_i B_i) A in odd rounds, B (Σ p_i A_i) in even ones (RoLoRA, arXiv 2409.02346 and 2502.01755).

    Exact, as all sites share the factor that is not trained; unlike in FFA-LoRA both factors move. The first round
    trains B: it is zero then, and A would get no gradient.
    """

    name = "rolora"
    refuses = LoraStrategy.refuses | {
        "server_momentum": "it is taken on weight updates, and their truncation would turn the factor that stays; "
        "use strategy = 'exact'",
        "buffered": "an update of the round before trained the other factor; use strategy = 'exact'",
    }

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self._trained: Literal["A", "B"] = "B"

    def mean(self, parent: Adapter) -> Mean:
        return FactorMean(parent, exact=True)

    def require(self, update: Factors, received: Adapter) -> None:
        require_frozen(update, received, "A" if self._trained == "B" else "B")

    def plan(self, plan: TrainPlan, round: int, site_max_rank: int) -> TrainPlan:
        """Return the base class's plan for one factor, and remember that this round's updates may change no other."""
        self._trained = "B" if round % 2 else "A"
        return super().plan(plan, round, site_max_rank).model_copy(update={"factors": self._trained})
