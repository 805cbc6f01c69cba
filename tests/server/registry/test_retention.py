"""Garbage collection: the weights it removes, and those that it must keep."""

import shutil
from pathlib import Path

import pytest

from server.registry import retention
from server.registry import views as registry_views
from server.registry.registry import AdapterRegistry
from tests.toys.registry import begun, blob, flip, grow, publish, v
from umbel.errors import RegistryError


def collect(registry: AdapterRegistry, **how: bool) -> retention.Garbage:
    return retention.collect(registry, who="eva", why="too many", **how)


def readable(registry: AdapterRegistry) -> list[int]:
    """Return the versions whose weights can be read; the others must name who removed them and why."""
    found = []
    for manifest in registry.versions("support"):
        if not (registry.directory(manifest.ref) / "pruned.json").exists():
            assert registry.read(manifest.ref)[0]
            found.append(manifest.version)
            continue
        with pytest.raises(RegistryError, match=r"its weights were removed at .* by eva: too many"):
            registry.read(manifest.ref)
    return found


def test_what_an_alias_a_round_or_a_lineage_needs_stays(tmp_path: Path) -> None:
    registry = begun(tmp_path)
    grow(registry, "aaraaro")
    registry.point("support", {"audit": v(6)}, who="eva", why="a rejected one, looked into")
    assert retention.plan(registry).versions == (v(3),)
    assert readable(registry) == list(range(8)), "planning removes nothing"
    garbage = collect(registry)
    assert garbage.versions == (v(3),)
    assert garbage.freed == len(blob(3))
    assert readable(registry) == [0, 1, 2, 4, 5, 6, 7]
    assert registry_views.verify(registry)["damages"] == []
    assert retention.plan(registry) == retention.Garbage((), (), ())


def test_what_an_alias_of_a_version_that_is_gone_needs_is_not_removed(tmp_path: Path) -> None:
    registry = begun(tmp_path)
    grow(registry, "aa")
    registry.close()
    shutil.rmtree(tmp_path / "support" / "v000002")
    (tmp_path / "registry.sqlite").unlink()
    reopened = AdapterRegistry(tmp_path)
    with pytest.raises(RegistryError, match=r"an alias points to support@v2, which is not here.*restore it"):
        collect(reopened)
    assert len(list((tmp_path / "blobs").iterdir())) == 3, "its weights may be all that is left of it"
    reopened.point("support", {"head": v(1), "live": v(1)}, who="eva", why="v2 is lost")
    assert len(collect(reopened).blobs) == 1


def test_ancestors_go_only_when_asked_and_what_came_of_them_can_still_be_explained(tmp_path: Path) -> None:
    registry = begun(tmp_path)
    grow(registry, "aaao")
    assert collect(registry, drop_ancestors=True).versions == (v(0), v(1))
    assert readable(registry) == [2, 3, 4]  # previous; head and live; shadow
    shown = registry_views.show(registry, "support@v1")
    assert shown["weights"] == {"a": 0.25, "b": 0.75}
    assert [str(node.ref) for node in registry_views.nodes(registry, "support@v3")] == [
        f"support@v{version}" for version in range(4)
    ]
    assert [row["pruned"] for row in registry_views.ls(registry)] == [True, True, False, False, False]
    with pytest.raises(RegistryError, match="cannot be pointed at"):
        registry.point("support", {"head": v(1)}, who="eva", why="x")
    assert publish(registry, 9) == v(5)


def test_weights_that_two_versions_share_stay_for_the_one_that_is_needed(tmp_path: Path) -> None:
    registry = begun(tmp_path)
    (needed,) = grow(registry, "a")
    again = registry.publish("support", blob(1), round=2, run_id="r", parent="p").ref
    registry.rounds.record("support", 2, "r", registry.rounds.find("support", 1).state)
    garbage = collect(registry)
    assert (garbage.versions, garbage.blobs) == ((again,), ())
    assert registry.read(needed)[0] == blob(1)


def test_left_overs_of_killed_publishers_go(tmp_path: Path) -> None:
    registry = begun(tmp_path)
    half = tmp_path / "support" / ".v000001.4242.tmp"
    half.mkdir()
    (half / "manifest.json").write_text("{")
    registry.blobs.put(b"never published")
    (tmp_path / "blobs" / ".0123.4242.tmp").write_bytes(b"half")
    garbage = collect(registry)
    assert garbage.left_overs == (half,)
    assert len(garbage.blobs) == 2
    assert not half.exists()
    assert registry_views.verify(registry)["damages"] == []


def test_killed_in_the_middle_the_next_call_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = begun(tmp_path)
    grow(registry, "rr")

    def killed(*_: object) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(type(registry.blobs), "remove", killed)
        with pytest.raises(KeyboardInterrupt):
            collect(registry)
    reopened = AdapterRegistry(tmp_path)
    assert readable(reopened) == [0]
    assert len(collect(reopened).blobs) == 2
    assert len(list((tmp_path / "blobs").iterdir())) == 1


def test_nothing_goes_while_a_damaged_version_hides_what_it_needs(tmp_path: Path) -> None:
    registry = begun(tmp_path)
    grow(registry, "ar")
    flip(registry.directory(v(1)) / "manifest.json", 0)
    registry.reindex()
    with pytest.raises(RegistryError, match=r"(?s)support@v1, which is not here.*v000001.*restore it from your backup"):
        collect(registry)
