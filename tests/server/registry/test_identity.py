"""A registry's own files: its id outlives the process, and what is lost or foreign is named."""

import sqlite3
from pathlib import Path

import pytest

from server.registry.registry import AdapterRegistry
from tests.toys.registry import PIN, begun, grow, publish, v
from umbel.adapter import AdapterRef
from umbel.errors import Conflict, RegistryError


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
    with pytest.raises(RegistryError, match="of another registry"):
        AdapterRegistry(tmp_path / "two")
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
