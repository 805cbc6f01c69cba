"""`FLoRA`: the sites' factors are stacked, not averaged; the stack is kept as extra rank of the adapter."""

from typing import ClassVar

from strategies.adapter import Adapter
from strategies.exact import Exact, ProductMean
from strategies.fold import Mean
from strategies.strategy import LoraStrategy
from umbel.errors import ConfigError


class FLoRA(Exact):
    """G' = G + Σ p_i (ΔW_i − G_i) at the rank that this sum has, up to `stack_rank`; beyond that, truncated to it.

    FLoRA (arXiv 2409.05976) sends the stack [p_1 B_1 | … | p_N B_N], [A_1; …; A_N] and merges it into the base. Here
    the base is shared with the served model and never written, so the stack stays an adapter: without loss while it
    fits, and the best approximation at `stack_rank` once it does not. Sites train at the run's rank, from G's
    truncation to it. `stack_rank` is at most every site's [engine].max_lora_rank; without it ConfigError is raised.
    """

    name = "flora"
    refuses: ClassVar[dict[str, str]] = {"personal_rank": LoraStrategy.refuses["personal_rank"]}

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        if not self.options.stack_rank:
            raise ConfigError("strategy = 'flora' needs stack-rank: the rank up to which it stacks")

    def mean(self, parent: Adapter) -> Mean:
        return ProductMean(
            parent, self.options.stack_rank, before=self._version_before(parent),
            momentum=self.options.server_momentum, device=self.options.device,
        )  # fmt: skip
