"""Compare two versions: the fields of their manifests, and the distance of their updates of the base."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from umbel import peft_dir
from umbel.adapter import AdapterManifest

Factor = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """The difference of two versions, `old` and `new`."""

    fields: dict[str, tuple[Any, Any]]
    """Field of the manifest → (old, new), for those that differ."""
    modules: dict[str, float]
    """Module → ‖BA − B'A'‖ / max(‖BA‖, ‖B'A'‖), Frobenius; 0 where both are zero, 1 where only one has the module."""
    distance: float
    """The same norm ratio over all modules together."""
    cosine: float
    """Cosine between the two updates as vectors; 0 when either is zero."""


def compare(old: tuple[bytes, AdapterManifest], new: tuple[bytes, AdapterManifest]) -> Difference:
    """Compare two versions (safetensors bytes and manifest).

    The factors may differ in rank and in gauge (B M, M⁻¹ A is the same update as B A).
    """
    before, after = old[1].model_dump(mode="json"), new[1].model_dump(mode="json")
    both = ((name, before.get(name), after.get(name)) for name in AdapterManifest.model_fields)
    fields = {name: (one, other) for name, one, other in both if one != other}
    one, other = (peft_dir.factors(peft_dir.decode(blob)) for blob, _ in (old, new))
    products = {module: _products(one.get(module), other.get(module)) for module in sorted({**one, **other})}
    total = tuple(sum(column) for column in zip(*products.values(), strict=True))
    cosine = total[2] / math.sqrt(total[0] * total[1]) if total[0] and total[1] else 0.0
    return Difference(
        fields, {module: _distance(*three) for module, three in products.items()}, _distance(*total), cosine
    )


def _products(one: Any, other: Any) -> tuple[float, float, float]:
    """⟨BA, BA⟩, ⟨B'A', B'A'⟩, ⟨BA, B'A'⟩ from Gram matrices of the factors; no [out, in] product is formed."""
    x, y = (None if pair is None else tuple(f.astype(np.float64) for f in pair) for pair in (one, other))
    return (
        0.0 if x is None else _inner(*x, *x),
        0.0 if y is None else _inner(*y, *y),
        0.0 if x is None or y is None else _inner(*x, *y),
    )


def _inner(a: Factor, b: Factor, a2: Factor, b2: Factor) -> float:
    """⟨B A, B₂ A₂⟩ = tr((Bᵀ B₂)(A₂ Aᵀ)); a is [r, in], b is [out, r]."""
    return float(np.sum((b.T @ b2) * (a @ a2.T)))


def _distance(xx: float, yy: float, xy: float) -> float:
    """Return the distance relative to the larger norm; below 1e-7 it is rounding of the three products."""
    larger = max(xx, yy)
    return math.sqrt(max(0.0, xx + yy - 2 * xy) / larger) if larger else 0.0
