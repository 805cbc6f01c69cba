"""Which version came of which, how far apart two of them are, and what others load."""

import json
import re
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.registry import diff as adapter_diff
from server.registry import export as adapter_export
from server.registry import lineage, lineage_picture
from server.registry import views as registry_views
from server.registry.registry import AdapterRegistry
from tests.toys.registry import PIN, begun, blob, grow, publish
from umbel import peft_dir
from umbel.adapter import AdapterManifest, AdapterRef
from umbel.errors import ConfigError, NotFound


def v(version: int) -> AdapterRef:
    return AdapterRef("support", version)


def forked(root: Path) -> AdapterRegistry:
    """v0 → v1 → (v2 rejected, v3 → v4); v5 open, from v4 and a late update on v1."""
    registry = begun(root)
    grow(registry, "araa")
    parents = [registry.manifest(v(version)).digest for version in (4, 1)]
    publish(registry, 5, parents[0], parents=tuple(parents), weights={"a": 1.0}, strategy="geometric_median")
    return registry


def test_text_has_one_line_per_version_and_the_way_to_head_straight(tmp_path: Path) -> None:
    lines = lineage.text(lineage.graph(forked(tmp_path), "support")).splitlines()
    assert [(re.match(r"\s*", line)[0], re.search(r"@(v\d)", line)[1]) for line in lines] == [
        ("", "v0"), ("", "v1"), ("  ", "v2"), ("", "v3"), ("", "v4"), ("", "v5"),
    ]  # fmt: skip
    assert lines[2] == "  └ support@v2  round 2 exact  a 0.25  b 0.75  rejected"
    assert lines[4] == "support@v4  round 4 exact  a 0.25  b 0.75  [head]  [live]"
    assert lines[5] == "support@v5  round 5 geometric_median  a 1.00  also from support@v1  [shadow]  published"


def test_lineage_of_one_version_is_what_it_came_from(tmp_path: Path) -> None:
    registry = forked(tmp_path)
    assert [node.ref.version for node in registry_views.nodes(registry, "support@v3")] == [0, 1, 3]
    assert [node.ref.version for node in registry_views.nodes(registry, "support@shadow")] == [0, 1, 3, 4, 5]
    for unknown in ("other", "support@v9"):
        with pytest.raises(NotFound):
            registry_views.nodes(registry, unknown)


def test_a_thousand_rounds_are_one_straight_line() -> None:
    manifests = [
        AdapterManifest(
            name="support", version=i, digest=f"{i:064x}", base="0" * 64, lineage="l", round=i, rank=1,
            target_modules=("q_proj",), parent=f"{i - 1:064x}" if i else None,
        )
        for i in range(1500)
    ]  # fmt: skip
    nodes = [lineage.Node(m, (v(m.version - 1),) if m.version else (), (), "", False) for m in manifests]
    assert all(line.startswith("support@") for line in lineage.text(nodes).splitlines())


def test_the_picture_holds_every_version_and_every_edge(tmp_path: Path) -> None:
    nodes = lineage.graph(forked(tmp_path), "support")
    lineage_picture.draw(nodes, tmp_path / "l.svg")
    ids = {element.get("id") for element in ElementTree.parse(tmp_path / "l.svg").iter()}
    edges = {f"support@v{a}→support@v{b}" for a, b in [(0, 1), (1, 2), (1, 3), (3, 4), (4, 5), (1, 5)]}
    assert edges <= ids
    lineage_picture.draw(nodes, tmp_path / "l.png")
    assert (tmp_path / "l.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="Format 'doc' is not supported"):
        lineage_picture.draw(nodes, tmp_path / "l.doc")


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


def test_an_export_is_whole_and_its_card_names_sites_reasons_and_errors(tmp_path: Path) -> None:
    registry = begun(tmp_path / "r")
    publish(
        registry, 1, weights={"a": 0.6, "b": 0.4}, left_out={"c": "its adapter holds NaN | really\n# no"},
        certificate={"model.layers.0.self_attn.q_proj": 1.5e-7}, counts={"a": {"num-examples": 320}},
        site_metrics={"a": {"train-loss": 1.25}}, options={"norm-clip": 2.0}, code="0.1.0", config="c" * 64,
    )  # fmt: skip
    into = adapter_export.export(registry, v(1), tmp_path / "out" / "support", base="meta-llama/Llama-3.1-8B")
    checked = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=into, capture_output=True, check=False
    )
    assert checked.returncode == 0
    assert (into / "adapter_model.safetensors").read_bytes() == blob(1)
    config = json.loads((into / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "meta-llama/Llama-3.1-8B"
    card = (into / "README.md").read_text()
    assert card.startswith('---\nbase_model: "meta-llama/Llama-3.1-8B"\nlibrary_name: peft\ntags:')
    for line in ("| a | 0.6000 | num-examples 320 | train-loss 1.25 |", "| c | its adapter holds NaN \\| really # no |",
                 "| model.layers.0.self_attn.q_proj | 1.5e-07 |", "| options | norm-clip 2 |"):  # fmt: skip
        assert line in card.splitlines()
    for part in (PIN.fingerprint.digest, registry.lineage, "--lora-paths support-v1=./support-v1", "its chat template"):
        assert part in card
    with pytest.raises(ConfigError, match="there already"):
        adapter_export.export(registry, v(1), into)
