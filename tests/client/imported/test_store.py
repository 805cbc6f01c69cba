"""The files of adapters that are only served: nothing that was changed or no longer fits is given to an engine."""

from dataclasses import replace
from pathlib import Path

import pytest

from client.imported import child
from client.imported.journal import Imported
from client.imported.store import ImportedStore
from client.journal import Journal
from tests.toys.deployment import SHAPES
from tests.toys.engine import site_config
from tests.toys.sites.peft_directory import digest_of, peft_directory
from umbel import peft_dir
from umbel.errors import AdapterError


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImportedStore:
    monkeypatch.setattr(child, "make", child.made)
    return opened(tmp_path)


def opened(state_dir: Path, **engine: object) -> ImportedStore:
    """Open the store of a site whose engine has other settings."""
    return ImportedStore(site_config(state_dir, **engine), Journal(state_dir / "journal.sqlite3").imported, SHAPES)


def served(store: ImportedStore, tmp_path: Path, *, listed: bool = False) -> Imported:
    entry = store.take("legal", peft_directory(tmp_path / "legal"), listed=listed)
    store.journal.put(entry)
    return entry


def damage(store: ImportedStore, entry: Imported, name: str = peft_dir.WEIGHTS) -> Path:
    file = store.directory(entry.ref) / name
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    return file


def test_what_was_taken_is_remembered_and_verified(store: ImportedStore, tmp_path: Path) -> None:
    entry = served(store, tmp_path)
    assert (entry.digest, entry.rank, entry.path) == (digest_of(tmp_path / "legal"), 2, tmp_path / "legal")
    assert opened(tmp_path).journal.all() == [entry]
    assert opened(tmp_path).verified(entry.ref) == tmp_path / "served" / f"legal-{entry.digest[:16]}"
    assert store.mend() == []


@pytest.mark.parametrize("name", [peft_dir.WEIGHTS, peft_dir.CONFIG])
def test_damaged_files_are_made_anew_from_where_they_came(store: ImportedStore, tmp_path: Path, name: str) -> None:
    entry = served(store, tmp_path)
    file = damage(store, entry, name)
    with pytest.raises(AdapterError, match=f"{name}.*damaged"):
        store.verified(entry.ref)
    (said,) = store.mend()
    assert f"{entry.ref} could not be loaded ({file}: " in said
    assert f"was made anew from {tmp_path / 'legal'}" in said
    assert store.verified(entry.ref)
    assert store.mend() == []


def test_lost_files_whose_origin_holds_another_adapter_now_are_forgotten(store: ImportedStore, tmp_path: Path) -> None:
    entry = served(store, tmp_path)
    damage(store, entry)
    peft_directory(tmp_path / "legal", seed=1)
    (said,) = store.mend()
    assert f"{tmp_path / 'legal'} holds another adapter now" in said
    assert "`umbel adapter load … legal PATH`" in said
    assert store.journal.all() == []


def test_what_stands_in_the_site_file_comes_back_with_the_next_start(store: ImportedStore, tmp_path: Path) -> None:
    damage(store, served(store, tmp_path, listed=True))
    (tmp_path / "legal" / peft_dir.CONFIG).unlink()
    assert "the next start reads it anew" in store.mend()[0]


@pytest.mark.parametrize(("engine", "why"), [
    ({"dtype": "bfloat16"}, "not made for [engine].dtype = 'bfloat16'"),
    ({"target_modules": ("q_proj", "v_proj", "o_proj")}, "made for other [engine].target_modules"),
])  # fmt: skip
def test_an_engine_with_other_settings_gets_it_made_for_them(
    store: ImportedStore, tmp_path: Path, engine: dict[str, object], why: str
) -> None:
    entry = served(store, tmp_path)
    other = opened(tmp_path, **engine)
    (said,) = other.mend()
    assert why in said
    (again,) = other.journal.all()
    assert other.verify(again)
    assert (again.source, again.path) == (entry.source, entry.path)


def test_a_rank_that_the_engine_does_not_take_any_more_is_said(store: ImportedStore, tmp_path: Path) -> None:
    served(store, tmp_path)
    (said,) = opened(tmp_path, max_lora_rank=1).mend()
    assert "its rank is 2, and [engine].max_lora_rank is 1" in said
    assert store.journal.all() == []


def test_what_nobody_took_is_not_given_to_an_engine(store: ImportedStore, tmp_path: Path) -> None:
    entry = served(store, tmp_path)
    with pytest.raises(AdapterError, match="is not here"):
        store.verified(replace(entry, digest="0" * 64).ref)
