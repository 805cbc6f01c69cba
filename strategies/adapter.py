"""What goes into a round and what comes out of it: a parent adapter, the sites' updates, their aggregate."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from strategies.factors import factors_of, truncated
from strategies.lowrank import LowRank
from umbel import peft_dir
from umbel.messages import RoundReport
from umbel.peft_dir import Tensors


@dataclass(frozen=True)
class Adapter:
    """A version in memory, in canonical form (alpha == r, so scale 1)."""

    blob: bytes = field(repr=False)
    """Safetensors bytes."""
    base: str
    """Digest of the base fingerprint it belongs to."""
    digest: str = ""
    tensors: Tensors = field(default_factory=dict, repr=False)
    _truncations: "dict[int, Adapter]" = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, blob: bytes, base: str) -> "Adapter":
        """Decode an adapter's bytes; raise AdapterError for anything else."""
        return cls(blob, base, peft_dir.digest(blob), peft_dir.decode(blob))

    @property
    def rank(self) -> int:
        return peft_dir.rank_of(self.tensors)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Module path → (out, in)."""
        return {module: (b.shape[0], a.shape[1]) for module, (a, b) in peft_dir.factors(self.tensors).items()}

    @property
    def dtype(self) -> np.dtype[np.generic]:
        return next(iter(self.tensors.values())).dtype

    @cached_property
    def factors(self) -> dict[str, LowRank]:
        """Module path → its update."""
        return factors_of(self.tensors)

    def at_rank(self, rank: int) -> "Adapter":
        """What a site of that rank receives: its truncation, or the adapter itself where the rank suffices."""
        if rank >= self.rank:
            return self
        if rank not in self._truncations:
            self._truncations[rank] = Adapter.of(peft_dir.encode(truncated(self.tensors, rank)), self.base)
        return self._truncations[rank]


@dataclass(frozen=True)
class Update:
    """What one site sends back from a round."""

    site: str
    blob: bytes = field(repr=False)
    report: RoundReport
    base: str
    """Digest of the site's base fingerprint."""


@dataclass(frozen=True)
class Aggregate:
    """A new version's tensors, and how they came about."""

    tensors: Tensors = field(repr=False)
    """Empty when no update was admitted."""
    weights: dict[str, float]
    """Site → share: what its change was multiplied by; 0 for one that a robust rule rejected.

    They sum to 1, or to less where changes were shortened.
    """
    left_out: dict[str, str]
    """Site → why its update is not in here, or has no weight."""
    certificate: dict[str, float]
    """Module → relative Frobenius error against the exact mean; empty for rules that have none."""
