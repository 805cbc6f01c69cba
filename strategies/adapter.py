"""`Adapter`, `Update`, `Aggregate`: a round's parent, a site's update, the result; from tensors to factors and back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch

from strategies.lowrank import LowRank, truncate, wake, weighted_sum
from umbel import peft_dir
from umbel.messages import RoundReport
from umbel.peft_dir import Array, Tensors

Factors = Mapping[str, LowRank]
"""Module path → its update."""
PUBLISHED = np.dtype(np.float32)
"""Dtype of every version that is made here, whatever the sites serve in: a bfloat16 keeps three digits of a factor, and
a late round changes less than that. A site rounds to its engine's dtype when it loads a version."""


@dataclass(frozen=True)
class Adapter:
    """An adapter version in memory, in canonical form (alpha == r, so scale 1)."""

    blob: bytes = field(repr=False)
    """Safetensors bytes."""
    base: str
    """Digest of the fingerprint of the base that it was trained against."""
    digest: str = ""
    """sha256 of `blob`."""
    tensors: Tensors = field(default_factory=dict, repr=False)
    _truncations: "dict[int, Adapter]" = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, blob: bytes, base: str) -> "Adapter":
        """Decode an adapter's safetensors bytes; raise AdapterError for anything else."""
        return cls(blob, base, peft_dir.digest(blob), peft_dir.decode(blob))

    @property
    def rank(self) -> int:
        """The rank of its modules; raises AdapterError when it has none."""
        return peft_dir.rank_of(self.tensors)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Module path → (out, in)."""
        return {module: (b.shape[0], a.shape[1]) for module, (a, b) in peft_dir.factors(self.tensors).items()}

    @cached_property
    def factors(self) -> dict[str, LowRank]:
        """Module path → its update, in the adapter's dtype."""
        return factors_of(self.tensors)

    def at_rank(self, rank: int) -> "Adapter":
        """Return the version that a site of `rank` receives: a truncation, or the adapter itself if its rank fits."""
        if rank >= self.rank:
            return self
        if rank not in self._truncations:
            self._truncations[rank] = Adapter.of(peft_dir.encode(truncated(self.tensors, rank)), self.base)
        return self._truncations[rank]


@dataclass(frozen=True)
class Update:
    """The message of one site at the end of a round: its trained adapter and its report."""

    site: str
    blob: bytes = field(repr=False)
    report: RoundReport
    base: str
    """Digest of the site's base fingerprint; of the parent's where both are kin, in a run with `mixed-bases`."""


@dataclass(frozen=True)
class Aggregate:
    """A new version's tensors, with each site's weight, the reasons for omissions, and the error."""

    tensors: Tensors = field(repr=False)
    """Empty when no update was admitted."""
    weights: dict[str, float]
    """Site → p_i, times the factor that its change was shortened by (`norm_clip`); 0 where a robust rule rejected it.

    They sum to 1, or to less where changes were shortened. The change itself is taken per step (`strategies.fold`).
    """
    left_out: dict[str, str]
    """Site → reason why its update is not in the version, or has weight 0."""
    certificate: dict[str, float] = field(default_factory=dict)
    """Module → `Errors.of_version`; empty for rules that do not compute it."""
    change_certificate: dict[str, float] = field(default_factory=dict)
    """Module → `Errors.of_change`."""


class Errors(NamedTuple):
    """The Frobenius error of a module as it is published, Ĝ, against the exact G', relative to two lengths."""

    of_version: float
    """‖Ĝ − G'‖ / ‖G'‖."""
    of_change: float
    """‖Ĝ − G'‖ / ‖G' − G‖, of what the round changed in the parent G; 0 where it changed nothing."""

    @classmethod
    def of(cls, error: float, version: float, changed: float) -> "Errors":
        """Divide an error by both lengths; by a length of 0 it is 0."""
        return cls(error / version if version else 0.0, error / changed if changed else 0.0)


def factors_of(tensors: Tensors) -> dict[str, LowRank]:
    """Read an adapter's tensors as updates, in their own dtype; raise AdapterError when they are no LoRA factors."""
    return {module: LowRank(_tensor(b), _tensor(a)) for module, (a, b) in peft_dir.factors(tensors).items()}


def tensors_of(factors: Factors, dtype: npt.DTypeLike) -> Tensors:
    """Write updates as an adapter's tensors in canonical form (alpha == r), in `dtype`."""
    tensors: Tensors = {}
    for module, update in factors.items():
        canonical = update.canonical()
        tensors[peft_dir.key(module, "A")] = _array(canonical.A, np.dtype(dtype))
        tensors[peft_dir.key(module, "B")] = _array(canonical.B, np.dtype(dtype))
    return tensors


def truncated(tensors: Tensors, rank: int) -> Tensors:
    """Return an adapter at a smaller rank, for a site of that rank; the same input gives the same bytes.

    Each module becomes its best approximation. Ranks that are left empty keep a row of A, so that they can be trained.
    """
    dtype = next(iter(tensors.values())).dtype
    return tensors_of({name: wake(truncate(full, rank)[0], full) for name, full in factors_of(tensors).items()}, dtype)


def change(trained: LowRank, received: LowRank) -> LowRank:
    """Return a site's change of one module, ΔW − ΔW_received, at the sum of both ranks."""
    return weighted_sum([trained, received], [1.0, -1.0])


def same(one: LowRank, other: LowRank) -> bool:
    """Return True if two updates have exactly the same factors and scale; their dtypes may differ."""
    return equal(one.A, other.A) and equal(one.B, other.B) and one.scale == other.scale


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return True if two tensors hold exactly the same numbers, whatever their dtypes: float64 holds those of each."""
    return torch.equal(one.double(), other.double())


def _tensor(array: Array) -> torch.Tensor:
    # torch cannot read numpy's bfloat16 (ml_dtypes), but the bits are the same.
    if array.dtype == np.dtype(ml_dtypes.bfloat16):
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def _array(tensor: torch.Tensor, dtype: np.dtype[np.generic]) -> Array:
    if dtype == np.dtype(ml_dtypes.bfloat16):
        bits = tensor.cpu().to(torch.bfloat16).contiguous().view(torch.int16).numpy()
        return bits.view(dtype)
    array: Array = tensor.cpu().double().numpy().astype(dtype)
    return array
