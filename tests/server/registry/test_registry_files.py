"""The files of a registry are the truth: every flipped bit is found and named, and the index is made from them."""

import json
import shutil
import sqlite3
import subprocess
from pathlib import Path

import pytest

from server.registry import views as registry_views
from server.registry.events import Events
from server.registry.registry import AdapterRegistry
from server.registry.round_log import SCHEMA as ROUNDS_SCHEMA
from server.registry.round_log import RoundState
from tests.toys.registry import PIN, begun, blob, flip, grow, publish
from umbel import peft_dir
from umbel.adapter import AdapterManifest, AdapterRef
from umbel.errors import AdapterError, Conflict, NotFound, RegistryError

V1 = AdapterRef("support", 1)
FILES = ["adapter_config.json", "adapter_model.safetensors", "manifest.json", "SHA256SUMS"]


def v(version: int) -> AdapterRef:
    return AdapterRef("support", version)


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_in_any_region_of_any_file_is_found_and_named(tmp_path: Path, name: str) -> None:
    registry = begun(tmp_path)
    grow(registry, "aa")
    path = registry.directory(V1) / name
    size = path.stat().st_size
    # The safetensors header, its length, the first and the last tensor, braces, keys, digits, line ends: all of them.
    for at in sorted(
        {0, 1, 7, 8, 9, size // 4, size // 3, size // 2, size - 2, size - 1, *range(0, size, 1 + size // 40)}
    ):
        for bit in (1, 32, 128):
            flip(path, at, bit)
            damages = registry_views.verify(registry)["damages"]
            assert len(damages) == 1, (at, bit)
            assert str(path.resolve()) in damages[0]
            with pytest.raises(RegistryError, match=path.resolve().name):
                registry.read(V1)
            flip(path, at, bit)
    assert registry_views.verify(registry) == {"versions": 3, "damages": []}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_missing_is_named(tmp_path: Path, name: str) -> None:
    registry = begun(tmp_path)
    path = (registry.directory(v(0)) / name).resolve()
    path.unlink()
    assert [damage for damage in registry.verify(v(0)) if str(path) in damage and "is missing" in damage]


def test_a_flipped_bit_in_the_alias_log_is_found_and_named(tmp_path: Path) -> None:
    registry = begun(tmp_path)
    grow(registry, "aa")
    log = tmp_path / "support" / "aliases.jsonl"
    whole = log.read_bytes()
    for at in range(0, len(whole), 7):
        flip(log, at)
        assert any("aliases.jsonl, line" in damage for damage in registry_views.verify(registry)["damages"]), at
        log.write_bytes(whole)
    lines = whole.splitlines(keepends=True)
    log.write_bytes(lines[0] + lines[2])
    with pytest.raises(RegistryError, match="line 2: not what was written there, or a line before it is gone"):
        registry.resolve("support@head")


def test_sha256sum_alone_can_check_a_version(tmp_path: Path) -> None:
    registry = begun(tmp_path)
    check = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    assert subprocess.run(check, cwd=registry.directory(v(0)), capture_output=True, check=False).returncode == 0
    flip(registry.directory(v(0)) / "adapter_model.safetensors", 99)
    assert subprocess.run(check, cwd=registry.directory(v(0)), capture_output=True, check=False).returncode == 1


def test_equal_weights_are_kept_once_and_a_version_is_found_by_its_content(tmp_path: Path) -> None:
    registry = begun(tmp_path)
    first = publish(registry, 7)
    registry.publish("support", blob(7), round=8, run_id="r", parent="p")
    digest = registry.manifest(first).digest
    assert sorted(path.name for path in (tmp_path / "blobs").iterdir()) == sorted(
        [digest, registry.manifest(v(0)).digest]
    )
    assert registry.resolve(f"support@sha256:{digest[:12]}") == v(2), "the newest version with this content"
    with pytest.raises(NotFound):
        registry.resolve(f"support@sha256:{digest[:7]}")


def test_a_registry_can_be_moved_as_a_whole(tmp_path: Path) -> None:
    grow(begun(tmp_path / "here"), "a")
    shutil.move(tmp_path / "here", tmp_path / "there")
    registry = AdapterRegistry(tmp_path / "there")
    assert registry_views.verify(registry)["damages"] == []
    peft_dir.decode((registry.directory(V1) / "adapter_model.safetensors").read_bytes())


def test_aliases_say_who_moved_them_when_and_why(tmp_path: Path) -> None:
    registry = begun(tmp_path)
    assert registry.pointers("support") == {"head": v(0)}
    one, two, three, four = grow(registry, "aaro")
    assert registry.pointers("support") == {"head": two, "live": two, "previous": one, "shadow": four}
    assert registry.resolve("support@previous") == one
    registry.point("support", {"stable": one}, who="eva", why="the audit's")
    assert registry.roll_back("support", who="eva", why="worse answers") == one
    assert registry.pointers("support")["previous"] == two
    assert registry.aliases("support") == {"head": one, "live": one, "stable": one}
    assert registry.roll_back("support", who="eva", why="it was not the adapter") == two
    registry.point("support", {"stable": None}, who="eva", why="audit is over")
    assert [(move.to, move.who, move.why) for move in registry.moves("support")[-4:]] == [
        ({"stable": 1}, "eva", "the audit's"),
        ({"head": 1, "live": 1}, "eva", "worse answers"),
        ({"head": 2, "live": 2}, "eva", "it was not the adapter"),
        ({"stable": None}, "eva", "audit is over"),
    ]
    assert [ref.version for ref, _, _ in registry.history("support", "live")] == [1, 2, 1, 2]
    with pytest.raises(NotFound, match="support@stable"):
        registry.resolve("support@stable")
    assert three not in registry.pointers("support").values()


@pytest.mark.parametrize(
    ("alias", "to", "error"),
    [
        ("shadow", 0, RegistryError), ("previous", 0, RegistryError), ("head", None, RegistryError),
        ("v3", 0, AdapterError), ("Stable", 0, AdapterError), ("stable", 9, NotFound),
    ],
)  # fmt: skip
def test_an_alias_that_cannot_move_is_refused(
    tmp_path: Path, alias: str, to: int | None, error: type[Exception]
) -> None:
    registry = begun(tmp_path)
    with pytest.raises(error):
        registry.point("support", {alias: None if to is None else v(to)}, who="eva", why="x")
    assert len(registry.moves("support")) == 1


def test_nothing_is_pointed_at_a_version_whose_weights_are_gone(tmp_path: Path) -> None:
    registry = begun(tmp_path)
    grow(registry, "aa")
    (registry.directory(V1) / peft_dir.WEIGHTS).resolve().unlink()
    with pytest.raises(RegistryError, match="is missing"):
        registry.roll_back("support", who="eva", why="x")
    assert registry.aliases("support")["live"] == v(2)


def test_an_alias_of_a_version_that_was_moved_away_is_named(tmp_path: Path) -> None:
    registry = begun(tmp_path)
    grow(registry, "aa")
    shutil.rmtree(registry.directory(v(2)))
    registry.reindex()
    damages = registry_views.verify(registry)["damages"]
    assert [damage for damage in damages if "support@live is support@v2, which is not here" in damage]


def test_a_line_cut_short_by_a_kill_is_a_move_only_when_it_is_whole_and_the_next_one_follows(tmp_path: Path) -> None:
    registry = begun(tmp_path)
    grow(registry, "a")
    path = tmp_path / "support" / "aliases.jsonl"
    whole = path.read_bytes()
    start = whole.index(b"\n") + 1
    for end in [*range(start, len(whole), 9), len(whole) - 1, len(whole)]:
        path.write_bytes(whole[:end])
        moved = end >= len(whole) - 1
        assert registry.aliases("support") == ({"head": V1, "live": V1} if moved else {"head": v(0)}), end
        registry.point("support", {"stable": v(0)}, who="eva", why="x")
        assert len(registry.moves("support")) == (3 if moved else 2), end
        assert path.read_bytes().endswith(b"}\n")


def test_the_index_is_made_anew_with_versions_aliases_and_rounds(tmp_path: Path) -> None:
    registry = begun(tmp_path)
    grow(registry, "araao")
    events = Events(tmp_path / "events.jsonl")
    registry.rounds.record("support", 6, "r", RoundState.FAILED, reasons={"*": "no quorum"})
    events.emit("round.rejected", adapter="support", round=2, run_id="r", version=2, reasons={"a": "worse"})
    events.emit("round.failed", adapter="support", round=6, run_id="r", reasons={"*": "no quorum"})
    events.emit("round.started", adapter="support", round=7, run_id="r")
    said = (registry.lineage, registry.versions("support"), registry.pointers("support"), registry.pin("support"))
    rounds = [(one.round, one.state, one.version, one.reasons) for one in registry.rounds.all("support")]
    registry.close()
    for leftover in tmp_path.glob("registry.sqlite*"):
        leftover.unlink()
    again = AdapterRegistry(tmp_path)
    assert (again.lineage, again.versions("support"), again.pointers("support"), again.pin("support")) == said
    assert [(one.round, one.state, one.version, one.reasons) for one in again.rounds.all("support")] == rounds
    assert again.lost == ["round 7 of support was under way; the next run begins it again"]
    assert again.rounds.begin_run("next", "support", "plan") == 7
    assert publish(again, 8) == v(6)
    assert again.reindex() == ["round 7 of support was under way; the next run begins it again"]


def test_what_cannot_be_restored_is_said_and_never_taken_for_something_else(tmp_path: Path) -> None:
    registry = begun(tmp_path)
    grow(registry, "aaa")
    registry.close()
    (tmp_path / "registry.sqlite").unlink()
    flip(tmp_path / "support" / "v000003" / "manifest.json", 0)
    for _ in range(2):  # the second time from the index that was made
        again = AdapterRegistry(tmp_path)
        assert [manifest.version for manifest in again.versions("support")] == [0, 1, 2]
        assert any("v000003" in damage for damage in registry_views.verify(again)["damages"])
        with pytest.raises(NotFound):
            again.read(again.resolve("support@head"))
        again.close()
    again = AdapterRegistry(tmp_path)
    assert publish(again, 9) == v(4), "a damaged version's number is not given away"
    flip(tmp_path / "support" / "v000003" / "manifest.json", 0)
    assert not [line for line in again.reindex() if "v000003" in line]
    assert again.read(again.resolve("support@head"))[0] == blob(3)


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


def test_a_file_that_is_no_index_is_said_to_be_one(tmp_path: Path) -> None:
    begun(tmp_path).close()
    for leftover in tmp_path.glob("registry.sqlite*"):
        leftover.unlink()
    (tmp_path / "registry.sqlite").write_text("not a database, and long enough to be seen as such" * 10)
    with pytest.raises(RegistryError, match=r"not a database; end what uses the registry, delete .*registry.sqlite"):
        AdapterRegistry(tmp_path)


OLD_INDEX = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE pins (name TEXT PRIMARY KEY, pin TEXT NOT NULL);
CREATE TABLE versions (name TEXT, version INTEGER, manifest TEXT NOT NULL, PRIMARY KEY (name, version));
CREATE TABLE aliases (name TEXT, alias TEXT, version INTEGER NOT NULL, PRIMARY KEY (name, alias));
CREATE TABLE alias_history (name TEXT, alias TEXT, version INTEGER, run_id TEXT, at TEXT);
"""


def test_a_registry_of_the_first_release_is_taken_over_with_its_history(tmp_path: Path) -> None:
    database = sqlite3.connect(tmp_path / "registry.sqlite")
    database.executescript(OLD_INDEX + ROUNDS_SCHEMA)
    database.execute("INSERT INTO meta VALUES ('lineage', 'abcd')")
    database.execute("INSERT INTO pins VALUES ('support', ?)", (PIN.model_dump_json(),))
    for version in (0, 1):
        facts = {
            "name": "support", "version": version, "digest": peft_dir.digest(blob(version)),
            "base": PIN.fingerprint.digest, "lineage": "abcd", "round": version, "rank": 2,
            "target_modules": PIN.target_modules, "run_id": "r",
        }  # fmt: skip
        directory = tmp_path / "support" / f"v{version:06d}"
        peft_dir.write(directory, blob(version), AdapterManifest(**facts), base="b")
        old = {name: value for name, value in AdapterManifest(**facts).model_dump().items() if value}
        (directory / "manifest.json").write_text(json.dumps({**old, "round": version, "version": version}))
        database.execute("INSERT INTO versions VALUES ('support', ?, ?)", (version, json.dumps(facts)))
        for alias in ("head", "live")[: version + 1]:
            database.execute("INSERT INTO alias_history VALUES ('support', ?, ?, 'r', 'then')", (alias, version))
    database.execute("INSERT INTO rounds VALUES ('support', 1, 'r', 'promoted', 1, '{}', 'then')")
    database.commit()
    database.close()
    registry = AdapterRegistry(tmp_path)
    assert registry.lost == []
    assert registry.lineage == "abcd"
    assert registry.pin("support") == PIN
    assert registry.pointers("support") == {"head": v(1), "live": v(1)}
    assert [entry[0].version for entry in registry.history("support", "head")] == [0, 1]
    assert registry.rounds.find("support", 1).state is RoundState.PROMOTED
    assert registry.read(v(1))[0] == blob(1)
    assert registry_views.verify(registry)["damages"] == []
    flip(registry.directory(v(1)) / "adapter_config.json", 20)
    assert "adapter_config.json" in registry.verify(v(1))[0]
    grow(registry, "a")
    registry.close()
    assert AdapterRegistry(tmp_path).resolve("support@live") == v(2)
