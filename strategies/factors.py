"""An adapter as the strategies compute with it: one LowRank per module, made from PEFT tensors and back."""

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch

from strategies.lowrank import LowRank, truncate, wake, weighted_sum
from umbel import peft_dir
from umbel.peft_dir import Array, Tensors

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
