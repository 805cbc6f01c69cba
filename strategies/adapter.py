"""What goes into a round and what comes out of it: a parent adapter, the sites' updates, their aggregate."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch

from strategies.lowrank import LowRank, truncate, wake, weighted_sum
from umbel import peft_dir
from umbel.messages import RoundReport
from umbel.peft_dir import Array, Tensors


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


Factors = Mapping[str, LowRank]
"""Module path → its update."""


def factors_of(tensors: Tensors) -> dict[str, LowRank]:
    """An adapter's modules, in its own dtype."""
    return {module: LowRank(_tensor(b), _tensor(a)) for module, (a, b) in peft_dir.factors(tensors).items()}


def tensors_of(factors: Factors, dtype: npt.DTypeLike) -> Tensors:
    """Modules → an adapter in canonical form (alpha == r), in `dtype`."""
    tensors: Tensors = {}
    for module, update in factors.items():
        canonical = update.canonical()
        tensors[peft_dir.key(module, "A")] = _array(canonical.A, np.dtype(dtype))
        tensors[peft_dir.key(module, "B")] = _array(canonical.B, np.dtype(dtype))
    return tensors


def truncated(tensors: Tensors, rank: int) -> Tensors:
    """An adapter at a smaller rank, the same bytes every time: what a site of that rank receives.

    Each module's best approximation; ranks that this leaves empty keep a row of A, so that they can be trained.
    """
    dtype = next(iter(tensors.values())).dtype
    return tensors_of({name: wake(truncate(full, rank)[0], full) for name, full in factors_of(tensors).items()}, dtype)


def change(now: LowRank, received: LowRank) -> LowRank:
    """What a site changed of one module: ΔW − what it received, at both ranks together."""
    return weighted_sum([now, received], [1.0, -1.0])


def same(one: LowRank, other: LowRank) -> bool:
    """Whether two updates are the same factors, to the bit."""
    return torch.equal(one.A, other.A) and torch.equal(one.B, other.B) and one.scale == other.scale


def _tensor(array: Array) -> torch.Tensor:
    # torch knows bfloat16, and numpy's bfloat16 is ml_dtypes': the bits are the same.
    if array.dtype == np.dtype(ml_dtypes.bfloat16):
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def _array(tensor: torch.Tensor, dtype: np.dtype[np.generic]) -> Array:
    if dtype == np.dtype(ml_dtypes.bfloat16):
        bits = tensor.cpu().to(torch.bfloat16).contiguous().view(torch.int16).numpy()
        return bits.view(dtype)
    array: Array = tensor.cpu().numpy().astype(dtype)
    return array
