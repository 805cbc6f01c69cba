"""`LatestGrammars`: the compiled grammars that SGLang keeps, bounded; it would keep each that a user ever sent.

A grammar within the bounds of `serving.router.fields.schemas` has 0.1 to 10 MiB at a vocabulary of 150 000. One that
made way is compiled again when it comes again. Requests that are answered by it go on: each has a copy of its own.
`serving.plugin` registers both functions as hooks in SGLang's scheduler process. What waits to be compiled belongs to a
request in flight, so it is as many as those.
"""

from collections import OrderedDict
from typing import Any

MOST = 256
"""Grammars that are kept."""
MOST_BYTES = 256 << 20
"""Bytes of all that are kept, as XGrammar counts them; the latest one is kept whatever it has."""
COMPILER_BYTES = 64 << 20
"""Bytes of XGrammar's own cache below SGLang's, by which two requests that come at once compile once."""

Key = tuple[str, str]
"""Kind of a grammar, and its text."""


class LatestGrammars(OrderedDict[Key, Any]):
    """Takes the place of `BaseGrammarBackend.cache`; what was used last makes way last."""

    def get(self, key: Key, default: Any = None) -> Any:
        """Return a grammar, and count that as a use."""
        if key in self:
            self.move_to_end(key)
        return super().get(key, default)

    def __setitem__(self, key: Key, grammar: Any) -> None:
        super().__setitem__(key, grammar)
        self.move_to_end(key)
        while len(self) > MOST or (len(self) > 1 and self.size_bytes() > MOST_BYTES):
            self.popitem(last=False)

    def size_bytes(self) -> int:
        """Return the bytes of all grammars and of their texts."""
        return sum(len(text) + _size(grammar) for (_, text), grammar in self.items())


def keep_latest(result: None, backend: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER `BaseGrammarBackend.__init__`."""
    backend.cache = LatestGrammars()


def bound_compiler(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """BEFORE XGrammar's `GrammarCompiler.__init__`, which SGLang gives no limit."""
    return args, {"cache_limit_bytes": COMPILER_BYTES, **kwargs}


def _size(grammar: Any) -> int:
    """Return what XGrammar counts for a grammar (bytes), also for one that begins after reasoning; 0 for others."""
    compiled = getattr(getattr(grammar, "grammar", grammar), "ctx", None)
    return int(getattr(compiled, "memory_size_bytes", 0))
