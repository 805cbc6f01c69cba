"""`Dual`: a global adapter that is federated, and beside it one at each site that never leaves it."""

from typing import ClassVar

from strategies.exact import Exact
from umbel.adapter import Personal
from umbel.errors import ConfigError


class Dual(Exact):
    """Site i serves ΔW_i = B_G A_G + B_i A_i: G is aggregated as in `exact`, and (A_i, B_i), of `personal_rank`, stays.

    FedDPA (arXiv 2403.19211) and FDLoRA (arXiv 2406.07925) train a global and a personal adapter, and weigh the two per
    request, or by a search. Here both are trained at once and simply added: side by side they are one adapter of rank
    r + `personal_rank`, which any engine serves. A site whose engine has a smaller largest rank trains and serves the
    best approximation of G that fits beside its own adapter. Raises ConfigError without `personal_rank`.
    """

    name = "dual"
    refuses: ClassVar[dict[str, str]] = {"stack_rank": Exact.refuses["stack_rank"]}

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        if not self.options.personal_rank:
            raise ConfigError("strategy = 'dual' needs personal-rank: the rank of the adapter that stays at each site")

    @property
    def personal(self) -> Personal:
        """An adapter of rank `personal_rank` at each site."""
        return Personal(part="adapter", rank=self.options.personal_rank)
