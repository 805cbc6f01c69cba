"""`VersionIndex`: the index of a registry, an SQLite file that is rebuilt from the registry's files when it is lost.

It gives one writer at a time its transaction, and keeps a second copy of every manifest, against which files are
verified. Four things are in the index only, and a rebuilt one lacks them: the runs (with their plans, by which a new
run takes over a round in training), the `head` and `live` that a round under way began with, whether a judged version
was being promoted or discarded (it is judged again), and reasons that no event tells.
"""

import fcntl
import os
import sqlite3
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from server.registry import version_dir
from server.registry.round_log import SCHEMA as ROUNDS_SCHEMA
from server.registry.round_log import RoundLog, RoundState
from server.registry.round_recovery import recover
from umbel import peft_dir
from umbel.adapter import MAX_VERSION, AdapterManifest, AdapterRef, is_name
from umbel.errors import NotFound, RegistryError

INDEX = "registry.sqlite"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS versions (
    name TEXT, version INTEGER, manifest TEXT NOT NULL, sums TEXT NOT NULL, PRIMARY KEY (name, version));
CREATE TABLE IF NOT EXISTS damaged (path TEXT PRIMARY KEY, reason TEXT NOT NULL);
"""
_EDITION = zlib.crc32((_SCHEMA + ROUNDS_SCHEMA).encode()) >> 1
"""Kept in SQLite's user_version: an index with other tables, or with none, is rebuilt."""


@contextmanager
def explained(root: Path) -> Iterator[None]:
    """Raise RegistryError, with the remedy, where the index of the registry at `root` is damaged, or its disk full."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
            raise RegistryError(
                f"{root / INDEX}: cannot be written ({error}); make room on its disk, then try again"
            ) from error
        if isinstance(error, sqlite3.OperationalError | sqlite3.IntegrityError | sqlite3.ProgrammingError):
            raise
        raise RegistryError(
            f"{root / INDEX}: {error}; end what uses the registry, delete {INDEX}*, and it is made anew from the files"
        ) from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock; other processes that want it wait."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


class VersionIndex:
    """The versions of one registry, and the database that its rounds share. Writers hold a `transaction`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        # Transactions are begun by hand, so that a version number is taken and used by one writer. A writer holds its
        # transaction while weights travel to the blob store, and the next one waits for it.
        self.database = sqlite3.connect(root / INDEX, timeout=600.0, isolation_level=None)
        with explained(root), _locked(root):  # SQLite does not wait for another process that sets the mode
            self.database.execute("PRAGMA journal_mode = WAL")
            self.database.execute("PRAGMA synchronous = FULL")
        self.rounds = RoundLog(self.database)

    @property
    def fresh(self) -> bool:
        """True when the tables have to be made before anything else."""
        return bool(self.database.execute("PRAGMA user_version").fetchone()[0] != _EDITION)

    def names(self) -> list[str]:
        """Adapters with at least one version."""
        return [str(row[0]) for row in self.database.execute("SELECT DISTINCT name FROM versions ORDER BY name")]

    def versions(self, name: str) -> list[AdapterManifest]:
        """Manifests of an adapter, in order of their versions."""
        rows = self.database.execute("SELECT manifest FROM versions WHERE name = ? ORDER BY version", (name,))
        return [AdapterManifest.model_validate_json(row[0]) for row in rows]

    def get(self, ref: AdapterRef) -> tuple[AdapterManifest, str]:
        """Return a version's manifest and SHA256SUMS as they were published; raise NotFound, with the reason."""
        row = self.database.execute(
            "SELECT manifest, sums FROM versions WHERE name = ? AND version = ?", (ref.name, ref.version)
        ).fetchone()
        if row is None:
            raise NotFound(self.missing(ref))
        return AdapterManifest.model_validate_json(row[0]), str(row[1])

    def next_version(self, name: str, named: Iterable[int] = ()) -> int:
        """Return a number above every version that is listed, was made by a round, is `named`, or has a manifest here.

        What else stands in a version's place is stepped over: its number is not given away, and it is not replaced.
        """
        known = [
            self.database.execute(f"SELECT max(version) FROM {table} WHERE name = ?", (name,)).fetchone()[0]  # noqa: S608
            for table in ("versions", "rounds")
        ]
        places = version_dir.every(self._root, name)
        on_disk = [int(path.name[1:]) for path in places if os.path.lexists(path / peft_dir.MANIFEST)]
        number = max([-1, *(int(one) for one in known if one is not None), *named, *on_disk]) + 1
        while os.path.lexists(self._root / name / f"v{number:06d}"):
            number += 1
        if number > MAX_VERSION:
            raise RegistryError(f"{self._root / name}: no number is left above v{MAX_VERSION}; move that one elsewhere")
        return number

    def add(self, manifest: AdapterManifest, sums: str) -> None:
        """List a version whose files are written."""
        self.database.execute("DELETE FROM damaged WHERE path = ?", (f"{manifest.name}/v{manifest.version:06d}",))
        row = (manifest.name, manifest.version, manifest.model_dump_json(), sums)
        self.database.execute("INSERT INTO versions VALUES (?, ?, ?, ?)", row)

    def unlisted(self) -> list[Path]:
        """Return the directories of versions that are not listed, as a killed publisher leaves them."""
        rows = self.database.execute("SELECT name, version FROM versions").fetchall()
        known = {version_dir.path(self._root, AdapterRef(*row)) for row in rows}
        known |= {self._root / path for path in self.damaged()}
        return [path for path in version_dir.every(self._root) if path not in known]

    def damaged(self) -> dict[str, str]:
        """Path in the registry → reason why what is there, in a version's place, could not be listed."""
        rows = self.database.execute("SELECT path, reason FROM damaged ORDER BY path").fetchall()
        return {path: reason for path, reason in rows if os.path.lexists(self._root / path)}

    def missing(self, ref: AdapterRef) -> str:
        """Say that a version is not here, and what is known of the reason."""
        why = self.damaged().get(f"{ref.name}/v{ref.version:06d}")
        return f"{ref} is not in {self._root}" + (f": {why}" if why else "")

    def unexplained(self, lineage: str) -> dict[str, str]:
        """Return those of `damaged` that may be versions of this registry: nobody knows what weights they need."""
        return {
            path: why for path, why in self.damaged().items() if not _is_foreign(self._root, self._root / path, lineage)
        }

    def inspect(self) -> list[str]:
        """Name the damage of the index itself; empty where there is none."""
        try:
            with explained(self._root):
                (said,) = self.database.execute("PRAGMA quick_check(1)").fetchone()
                if said != "ok":
                    raise sqlite3.DatabaseError(" ".join(said.split()))
        except RegistryError as error:
            return [str(error)]
        return []

    def take_up(self, lineage: str) -> list[str]:
        """List the versions that are on disk only; keep and return the reason of each that cannot be listed."""
        lost = []
        for path in self.unlisted():
            try:
                self._list(path, lineage)
            except RegistryError as error:
                remedy = "" if _is_foreign(self._root, path, lineage) else "restore it from your backup, or "
                why = f"{error}; {remedy}move it out of {self._root}, then `umbel adapter reindex`"
                row = (str(path.relative_to(self._root)), why)
                self.database.execute("INSERT OR REPLACE INTO damaged VALUES (?, ?)", row)
                lost.append(f"not listed: {why}")
        return lost

    def _list(self, path: Path, lineage: str) -> None:
        """List the version in a directory; raise RegistryError when it is damaged or foreign."""
        manifest, sums = version_dir.read_manifest(path)
        if not is_name(manifest.name):
            raise RegistryError(f"{path}: holds a manifest of {manifest.name[:80]!r}, which cannot name an adapter")
        if manifest.lineage != lineage:
            raise RegistryError(f"{path}: holds {manifest.ref} of another registry, {manifest.lineage}")
        if version_dir.path(self._root, manifest.ref) != path:
            raise RegistryError(f"{path}: holds a copy of {manifest.ref}, and is not its place")
        self.add(manifest, sums)
        record = self.rounds.find(manifest.name, manifest.round)
        if manifest.round and (record is None or record.version is None):
            self.rounds.record(
                manifest.name, manifest.round, manifest.run_id, RoundState.PUBLISHED, version=manifest.version,
                reasons={**manifest.skipped, **manifest.left_out},
            )  # fmt: skip

    def rebuild(self, lineage: str) -> list[str]:
        """Make the tables from the files; return a line for each thing that could not be restored.

        Rounds that are in the index stay as they are.
        """
        lost: list[str] = []
        for table in ("versions", "damaged"):
            self.database.execute(f"DROP TABLE IF EXISTS {table}")
        for statement in filter(str.strip, (_SCHEMA + ROUNDS_SCHEMA).split(";")):
            self.database.execute(statement)
        known = {(name, number) for name, number in self.database.execute("SELECT name, round FROM rounds")}
        lost += self.take_up(lineage)
        for name in self.names():
            try:
                lost += recover(self.rounds, self._root, self.versions(name), known)
            except RegistryError as error:
                lost.append(f"rounds of {name}: {error}")
                self.rounds.forget(name, known)  # half of the story; the next rebuild tells it, with the file restored
        self.database.execute(f"PRAGMA user_version = {_EDITION}")
        return lost


def _is_foreign(root: Path, path: Path, lineage: str) -> bool:
    """Return whether a directory is known to hold no version of this registry, but one of another, or a copy."""
    try:
        manifest, _ = version_dir.read_manifest(path)
    except RegistryError:
        return False
    return manifest.lineage != lineage or root / manifest.name / f"v{manifest.version:06d}" != path
