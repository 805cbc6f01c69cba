"""The difference of two versions, held against the dense updates."""

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from server.registry import diff as adapter_diff
from server.registry import views as registry_views
from tests.toys.registry import PIN, begun, publish, v
from umbel import peft_dir
from umbel.adapter import AdapterManifest


def random_factors(seed: int, rank: int) -> peft_dir.Tensors:
    rng = np.random.default_rng(seed)
    tensors: peft_dir.Tensors = {}
    for module, (out, inner) in PIN.shapes.items():
        tensors[peft_dir.key(module, "A")] = rng.normal(size=(rank, inner)).astype(np.float32)
        tensors[peft_dir.key(module, "B")] = rng.normal(size=(out, rank)).astype(np.float32)
    return tensors


def dense(tensors: peft_dir.Tensors) -> np.ndarray:
    return np.concatenate([(b.astype(float) @ a.astype(float)).ravel() for a, b in peft_dir.factors(tensors).values()])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.integers(0, 99), st.integers(1, 5), st.integers(1, 5))
def test_distance_and_cosine_are_those_of_the_dense_updates(seed: int, other: int, r: int, s: int) -> None:
    one, two = random_factors(seed, r), random_factors(other, s)
    manifest = AdapterManifest(
        name="support", version=0, digest="0" * 64, base="0" * 64, lineage="l", round=0, rank=r,
        target_modules=("q_proj",),
    )  # fmt: skip
    changed = manifest.model_copy(update={"rank": s})
    found = adapter_diff.compare((peft_dir.encode(one), manifest), (peft_dir.encode(two), changed))
    x, y = dense(one), dense(two)
    larger = max(np.linalg.norm(x), np.linalg.norm(y))
    assert np.isclose(found.distance, np.linalg.norm(x - y) / larger, atol=1e-6)
    assert np.isclose(found.cosine, x @ y / np.linalg.norm(x) / np.linalg.norm(y), atol=1e-6)
    assert found.fields == ({} if r == s else {"rank": (r, s)})


def test_a_difference_does_not_see_the_gauge_and_copes_with_nothing(tmp_path: Path) -> None:
    registry = begun(tmp_path)
    publish(registry, 1)
    found = registry_views.diff(registry, "support@v0", "support@v1")
    assert (found["distance"], found["cosine"]) == (0, 0), "B is zero in both: neither changes the base"
    assert set(found["fields"]) >= {"version", "round", "digest", "strategy"}
    tensors = random_factors(0, 2)
    turned = dict(tensors)
    for module in PIN.shapes:
        a, b = peft_dir.key(module, "A"), peft_dir.key(module, "B")
        mix = np.array([[2.0, 1.0], [0.0, 0.5]], np.float32)
        turned[a], turned[b] = np.linalg.inv(mix) @ tensors[a], tensors[b] @ mix
    manifest = registry.manifest(v(0))
    assert (
        adapter_diff.compare((peft_dir.encode(tensors), manifest), (peft_dir.encode(turned), manifest)).distance < 1e-3
    )
