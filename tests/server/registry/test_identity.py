"""A registry's own files: its id outlives the process, what is lost is named, and what is none of them.

What is foreign, or only half there, is named; everything else goes on, and its number is not taken.
"""

import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from server.registry import retention
from server.registry import views as registry_views
from server.registry.metrics import CentreCollector
from server.registry.peft import export
from server.registry.registry import AdapterRegistry
from server.registry.round_log import RoundState
from tests.toys.registry import PIN, begun, blob, grow, publish, v
from umbel.adapter import MAX_VERSION, AdapterRef
from umbel.errors import Conflict, NotFound, RegistryError


def test_lineage_outlives_the_process_and_differs_between_registries(tmp_path: Path) -> None:
    one = begun(tmp_path / "one")
    assert AdapterRegistry(tmp_path / "one").lineage == one.lineage
    assert begun(tmp_path / "two").lineage != one.lineage


def test_missing_and_foreign_registries_are_said_so(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="no adapter registry here"):
        AdapterRegistry(tmp_path / "none")
    one, two = begun(tmp_path / "one"), begun(tmp_path / "two")
    publish(one, 1)
    one.directory(AdapterRef("support", 1)).rename(two.directory(AdapterRef("support", 1)))
    reopened = AdapterRegistry(tmp_path / "two")
    assert [manifest.version for manifest in reopened.versions("support")] == [0]
    assert f"holds support@v1 of another registry, {one.lineage}; move it out of {tmp_path / 'two'}" in reopened.lost[0]
    assert sqlite3.connect(tmp_path / "two" / "registry.sqlite").execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_without_its_other_files_a_registry_says_what_is_gone(tmp_path: Path) -> None:
    registry = begun(tmp_path)
    grow(registry, "aa")
    lineage = registry.lineage
    registry.close()
    for name in ("registry.sqlite", "registry.json", "support/pin.json", "support/aliases.jsonl"):
        (tmp_path / name).unlink()
    again = AdapterRegistry(tmp_path)
    assert again.lineage == lineage, "every manifest names it"
    assert any("events.jsonl is missing" in line for line in again.lost)
    assert again.pin("support") is None
    other = PIN.fingerprint.model_copy(update={"weights": "other"})
    with pytest.raises(Conflict):
        again.begin("support", PIN.model_copy(update={"fingerprint": other}), seed=3)
    with pytest.raises(RegistryError, match=r"no head.*umbel adapter alias support@v2 head"):
        again.begin("support", PIN, seed=3)
    again.point("support", {"head": v(2)}, who="eva", why="restored")
    again.begin("support", PIN, seed=3)
    assert again.resolve("support@head") == v(2)


def folder(place: Path) -> None:
    place.mkdir()


def half(place: Path) -> None:
    place.mkdir()
    (place / "adapter_config.json").write_text("{}")


def cut(place: Path) -> None:
    shutil.copytree(place.parent / "v000002", place, symlinks=True)
    manifest = place / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:200])


def hostile(place: Path) -> None:
    shutil.copytree(place.parent / "v000002", place, symlinks=True)
    manifest = place / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "name": "../../etc"}))
    (place / "SHA256SUMS").unlink()


def copy(place: Path) -> None:
    shutil.copytree(place.parent / "v000002", place, symlinks=True)


def file(place: Path) -> None:
    place.write_text("v3")


def link(place: Path) -> None:
    place.symlink_to("v000002")


def dangling(place: Path) -> None:
    place.symlink_to("nowhere")


def manifest_is_a_folder(place: Path) -> None:
    (place / "manifest.json").mkdir(parents=True)


INTRUDERS = [folder, half, cut, hostile, copy, file, link, dangling, manifest_is_a_folder]


def everything_goes_on(root: Path) -> AdapterRegistry:
    """Open the registry, and use every reader of it; return it open."""
    registry = AdapterRegistry(root)
    assert [manifest.version for manifest in registry.versions("support")] == [0, 1, 2]
    assert registry.read(registry.resolve("support@live"))[0] == blob(2)
    assert [row["ref"] for row in registry_views.ls(registry)] == [f"support@v{n}" for n in range(3)]
    assert len(registry_views.nodes(registry, "support@head")) == 3
    assert len(registry_views.history(registry, "support")) == 3
    samples = {family.name: family.samples for family in CentreCollector(root).collect()}
    assert [sample.value for sample in samples["umbel_federation_live_version"]] == [2]
    return registry


@pytest.mark.parametrize("index", ["kept", "lost"])
@pytest.mark.parametrize("intrude", INTRUDERS)
def test_what_stands_in_a_versions_place_is_named_and_everything_else_goes_on(
    tmp_path: Path, intrude: Callable[[Path], None], index: str
) -> None:
    root, place = tmp_path / "r", tmp_path / "r" / "support" / "v000003"
    registry = begun(root)
    grow(registry, "aa")
    registry.close()
    intrude(place)
    before = place.lstat().st_ino, place.lstat().st_mtime_ns
    if index == "lost":
        (root / "registry.sqlite").unlink()
    with closing(everything_goes_on(root)) as registry:
        (damage,) = [line for line in registry_views.verify(registry)["damages"] if not line.startswith("[")]
        assert str(place) in damage
        assert f"move it out of {root}, then `umbel adapter reindex`" in damage
        with pytest.raises(NotFound, match=r"support@v3"):
            registry.read(v(3))
        export.export(registry, v(2), tmp_path / "out")
        retention.collect(registry, who="eva", why="x")
        assert publish(registry, 3) == v(4), "the number is not given away"
        registry.accept("support", 3, "r", {})
        assert (place.lstat().st_ino, place.lstat().st_mtime_ns) == before, "nothing has touched it"
        assert any(str(place) in line for line in registry.reindex())
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink()
    with closing(AdapterRegistry(root)) as registry:
        assert registry_views.verify(registry)["damages"] == []
        assert [manifest.version for manifest in registry.versions("support")] == [0, 1, 2, 4]
        assert publish(registry, 4) == v(5)


def test_files_that_are_none_of_the_registrys_are_named_and_are_no_damage(tmp_path: Path) -> None:
    registry = begun(tmp_path)
    grow(registry, "aa")
    strange = [
        tmp_path / "README.txt", tmp_path / "unknown", tmp_path / "support.bak", tmp_path / "blobs" / "notes.txt",
        tmp_path / "support" / "v3", tmp_path / "support" / "v000002.orig", tmp_path / "support" / "aliases.jsonl~",
        tmp_path / "support" / ".v000003.swp", tmp_path / "support" / ".v000003.tmp",
        tmp_path / "support" / "v000002" / "manifest.json~",
    ]  # fmt: skip
    for path in strange:
        if path.suffix in ("", ".bak", ".orig", ".tmp"):
            shutil.copytree(tmp_path / "support" / "v000002", path, symlinks=True)
        else:
            path.write_text("mine")
    (tmp_path / "support" / "latest").symlink_to("v000002")
    found = registry_views.verify(registry)
    assert found["damages"] == []
    named = {line.partition(": ")[0] for line in found["foreign"]}
    assert named == {str(path) for path in [*strange, tmp_path / "support" / "latest"]}
    garbage = retention.collect(registry, who="eva", why="x")
    assert (garbage.blobs, garbage.left_overs) == ((), ())
    assert all(path.exists() for path in strange), "gc removes nothing that it did not make"
    everything_goes_on(tmp_path).close()


def test_weights_that_a_version_may_need_which_cannot_be_read_stay(tmp_path: Path) -> None:
    registry = begun(tmp_path)
    grow(registry, "arar")  # v2 and v4 were rejected
    (registry.directory(v(2)) / "manifest.json").write_text("{")
    registry.reindex()
    planned = retention.plan(registry)
    assert planned.versions == (v(4),)
    assert "v000002" in planned.kept[0]
    assert len(retention.collect(registry, who="eva", why="x").blobs) == 1
    assert len(list((tmp_path / "blobs").iterdir())) == 4
    (registry.directory(v(2)) / "manifest.json").unlink()
    shutil.rmtree(registry.directory(v(2)))
    garbage = retention.collect(registry, who="eva", why="x")
    assert (garbage.kept, len(garbage.blobs)) == ((), 1)


def test_a_damaged_line_of_the_alias_log_hides_the_aliases_and_no_version(tmp_path: Path) -> None:
    registry = begun(tmp_path)
    grow(registry, "ara")
    registry.close()
    log = tmp_path / "support" / "aliases.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole.replace(b'"head":1', b'"head":2'))
    for index in ("kept", "lost"):
        if index == "lost":
            (tmp_path / "registry.sqlite").unlink()
        with closing(AdapterRegistry(tmp_path)) as registry:
            assert [row["aliases"] for row in registry_views.ls(registry)] == [[]] * (4 + (index == "lost"))
            assert registry.read(registry.resolve("support@v3"))[0] == blob(3)
            with pytest.raises(RegistryError, match=r"aliases.jsonl, line 2: not what was written there"):
                registry.resolve("support@head")
            assert any("aliases.jsonl, line 2" in line for line in registry_views.verify(registry)["damages"])
            assert retention.plan(registry).versions == (), "no alias says what is needed"
            (damages,) = [one for one in CentreCollector(tmp_path).collect() if "damages" in one.name]
            assert [sample.value for sample in damages.samples] == [1]
            assert publish(registry, 9) == v(4 + (index == "lost"))
    log.write_bytes(whole)
    with closing(AdapterRegistry(tmp_path)) as registry:
        registry.reindex()
        assert registry.resolve("support@head") == v(3)
        states = [record.state for record in registry.rounds.all("support")]
        assert states[:3] == [RoundState.PROMOTED, RoundState.REJECTED, RoundState.PROMOTED]


def test_a_number_that_an_alias_names_is_not_given_to_another_version(tmp_path: Path) -> None:
    registry = begun(tmp_path)
    grow(registry, "aaa")
    registry.close()
    for number in (2, 3):
        shutil.rmtree(tmp_path / "support" / f"v{number:06d}")
    (tmp_path / "registry.sqlite").unlink()
    with closing(AdapterRegistry(tmp_path)) as registry:
        assert publish(registry, 4) == v(4)
        with pytest.raises(NotFound, match="support@v3 is not in"):
            registry.read(registry.resolve("support@head"))


def test_the_last_number_of_all_is_taken_by_a_copy_with_a_remedy(tmp_path: Path) -> None:
    registry = begun(tmp_path)
    shutil.copytree(registry.directory(v(0)), tmp_path / "support" / f"v{MAX_VERSION}", symlinks=True)
    with pytest.raises(RegistryError, match=r"no number is left above v999999999; move that one elsewhere"):
        publish(registry, 1)


def test_an_index_with_damaged_pages_is_named_with_the_remedy(tmp_path: Path) -> None:
    registry = begun(tmp_path)
    grow(registry, "a" * 8)
    registry.close()
    index = tmp_path / "registry.sqlite"
    content = bytearray(index.read_bytes())
    content[8192:] = b"x" * (len(content) - 8192)
    index.write_bytes(content)
    with pytest.raises(RegistryError, match=r"registry.sqlite: .*delete registry.sqlite\*, and it is made anew"):
        AdapterRegistry(tmp_path)
    index.unlink()
    assert len(AdapterRegistry(tmp_path).versions("support")) == 9


def test_an_adapter_cannot_be_called_as_the_folder_of_the_weights(tmp_path: Path) -> None:
    registry = begun(tmp_path)
    pin = registry.pin("support")
    assert pin is not None
    with pytest.raises(RegistryError, match="cannot be called blobs"):
        registry.begin("blobs", pin, seed=1)
