"""`find`: the strategy that a run configuration names."""

import difflib
import importlib

from strategies.dual import Dual
from strategies.exact import Exact
from strategies.fedit import FedIT
from strategies.fedsa import FedSA
from strategies.ffa import FFA
from strategies.flora import FLoRA
from strategies.rolora import RoLoRA
from strategies.strategy import LoraStrategy
from umbel.errors import ConfigError

STRATEGIES: dict[str, type[LoraStrategy]] = {
    strategy.name: strategy for strategy in (Exact, FedIT, FFA, FLoRA, RoLoRA, FedSA, Dual)
}


def find(name: str) -> type[LoraStrategy]:
    """Return the strategy called `name`, or the class "module:Class"; raise ConfigError for an unknown one."""
    if ":" in name:
        return _own(name)
    if name not in STRATEGIES:
        near = difflib.get_close_matches(name, STRATEGIES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(STRATEGIES))}"
        raise ConfigError(f"strategy = {name!r} is not a strategy; {hint}")
    return STRATEGIES[name]


def _own(name: str) -> type[LoraStrategy]:
    """Import "module:Class"; raise ConfigError when it cannot be, or is no LoraStrategy."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:  # the last two for ":" and ".x:Y"
        raise ConfigError(
            f"strategy = {name!r} cannot be imported ({error}); is its file among [tool.flwr.app].fab-include?"
        ) from error
    if not (isinstance(found, type) and issubclass(found, LoraStrategy)):
        raise ConfigError(f"strategy = {name!r} is no subclass of strategies.strategy.LoraStrategy")
    return found
