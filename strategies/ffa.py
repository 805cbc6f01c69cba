"""`FFA`: A keeps its initial value for ever, B is averaged."""

from strategies.adapter import Adapter, Factors
from strategies.fedit import FactorMean, require_frozen
from strategies.fold import Mean
from strategies.strategy import LoraStrategy
from umbel.messages import TrainPlan


class FFA(LoraStrategy):
    """ΔW' = (Σ p_i B_i) A₀ (FFA-LoRA, arXiv 2403.12313): exact, as the product is linear in B.

    The price is expressivity: the update stays in the row space of the random A₀.
    """

    name = "ffa"
    refuses = LoraStrategy.refuses | {
        "server_momentum": "it is taken on weight updates, and their truncation would turn the A that has to stay; "
        "use strategy = 'exact'"
    }

    def mean(self, parent: Adapter) -> Mean:
        return FactorMean(parent, exact=True)

    def require(self, update: Factors, received: Adapter) -> None:
        require_frozen(update, received, "A")

    def plan(self, plan: TrainPlan, round: int, site_max_rank: int) -> TrainPlan:
        return super().plan(plan, round, site_max_rank).model_copy(update={"factors": "B"})
