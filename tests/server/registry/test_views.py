"""The registry's views, as the command line and the REST API print them."""

import shutil
from pathlib import Path

import pytest

from server.registry import views as registry_views
from tests.toys.registry import begun, grow, v
from umbel.errors import NotFound


def test_an_alias_of_a_version_that_was_moved_away_is_named(tmp_path: Path) -> None:
    registry = begun(tmp_path)
    grow(registry, "aa")
    shutil.rmtree(registry.directory(v(2)))
    registry.reindex()
    damages = registry_views.verify(registry)["damages"]
    assert [damage for damage in damages if "support@live is support@v2, which is not here" in damage]


def test_ls_says_where_every_version_stands_and_gc_names_before_it_removes(tmp_path: Path) -> None:
    registry = begun(tmp_path)
    grow(registry, "ar")
    rows = {row["ref"]: row for row in registry_views.ls(registry)}
    assert [rows[f"support@v{version}"]["state"] for version in range(3)] == ["", "promoted", "rejected"]
    assert rows["support@v1"]["aliases"] == ["head", "live"]
    assert rows["support@v1"]["sites"] == ["a", "b"]
    planned = registry_views.gc(registry, apply=False, drop_ancestors=False, who="", why="")
    assert (planned["versions"], planned["removed"], planned["freed"]) == (["support@v2"], False, 0)
    assert registry_views.verify(registry) == {"versions": 3, "damages": []}
    removed = registry_views.gc(registry, apply=True, drop_ancestors=False, who="eva", why="x")
    assert (removed["versions"], removed["removed"]) == (["support@v2"], True)
    assert {row["ref"]: row["pruned"] for row in registry_views.ls(registry)}["support@v2"]


def test_an_adapter_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    registry = begun(tmp_path)
    for ask in (registry_views.history, registry_views.nodes):
        with pytest.raises(NotFound, match=r"'other' is not in .*; there is support"):
            ask(registry, "other")
