"""The strategies by the name a run configuration gives them."""

import difflib

from strategies.base import LoraStrategy
from strategies.exact import Exact
from strategies.fedit import FedIT
from umbel.errors import ConfigError

STRATEGIES: dict[str, type[LoraStrategy]] = {strategy.name: strategy for strategy in (Exact, FedIT)}


def find(name: str) -> type[LoraStrategy]:
    """The strategy called `name`; raise ConfigError, with what was perhaps meant, for an unknown one."""
    if name not in STRATEGIES:
        near = difflib.get_close_matches(name, STRATEGIES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(STRATEGIES))}"
        raise ConfigError(f"strategy = {name!r} is not a strategy; {hint}")
    return STRATEGIES[name]
