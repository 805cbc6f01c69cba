"""Dual adapters: a global one that is federated, and beside it each site's own."""

from typing import ClassVar

from strategies.exact import Exact
from umbel.adapter import Personal
from umbel.errors import ConfigError


class Dual(Exact):
    """Site i serves ΔW_i = B_G A_G + B_i A_i: G goes on as in `exact`, and (A_i, B_i), of `personal_rank`, stays there.

    FedDPA (arXiv 2403.19211) and FDLoRA (arXiv 2406.07925) train a global and a personal adapter, and weigh the two for
    each request, or by a search. Here both are trained at once and added as they are: side by side they are a single
    adapter of rank r + `personal_rank`, which any engine serves. A site that cannot hold that much trains and serves
    the best approximation of G that fits beside its own.
    """

    name = "dual"
    refuses: ClassVar[dict[str, str]] = {"stack_rank": Exact.refuses["stack_rank"]}

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        if not self.options.personal_rank:
            raise ConfigError("strategy = 'dual' needs personal-rank: the rank of the adapter that stays at each site")

    @property
    def personal(self) -> Personal:
        return Personal(part="adapter", rank=self.options.personal_rank)
