"""FedIT: the mean of A and the mean of B."""

from strategies.base import Factors, LoraStrategy
from strategies.lowrank import LowRank


class FedIT(LoraStrategy):
    """Ā = Σ p_i A_i, B̄ = Σ p_i B_i (Shepherd, arXiv 2305.05644): cheap, and the baseline in the literature.

    Not exact: Σ p_i B_i A_i − B̄ Ā = Σ p_i (B_i − B̄)(A_i − Ā), which is small while sites stay near each other and
    zero when they share a factor.
    """

    name = "fedit"

    def combine(
        self, parent: Factors, updates: dict[str, Factors], weights: dict[str, float]
    ) -> tuple[Factors, dict[str, float]]:
        combined: Factors = {}
        for module, reference in parent.items():
            b, a = 0.0 * reference.B, 0.0 * reference.A
            for site, weight in weights.items():
                b = b + weight * updates[site][module].B
                a = a + weight * updates[site][module].A
            combined[module] = LowRank(b, a)
        return combined, {}
