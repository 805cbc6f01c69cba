"""The lineage of an adapter as text: of all versions, and of one with its ancestors."""

import re
from pathlib import Path

import pytest

from server.registry import lineage
from server.registry import views as registry_views
from tests.toys.registry import forked, v
from umbel.adapter import AdapterManifest
from umbel.errors import NotFound


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


def test_what_a_site_called_itself_stays_on_its_line() -> None:
    manifest = AdapterManifest(
        name="support", version=1, digest="1" * 64, base="0" * 64, lineage="l", round=1, rank=1,
        target_modules=("q_proj",), strategy="exact", weights={"a\nsupport@v9  round 9\x1b[2K\u202e": 1.0},
    )  # fmt: skip
    text = lineage.text([lineage.Node(manifest, (), (), "", False)])
    assert text == r"support@v1  round 1 exact  a\nsupport@v9  round 9\u001b[2K\u202e 1.00"


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
