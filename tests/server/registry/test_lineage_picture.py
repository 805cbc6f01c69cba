"""The lineage as a picture."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from server.registry import lineage, lineage_picture
from tests.toys.registry import forked
from umbel.errors import ConfigError


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
