"""`VersionIndex`: the index of a registry, an SQLite file that is rebuilt from the registry's files when it is lost.

It gives one writer at a time its transaction, and keeps a second copy of every manifest, against which files are
verified. Four things are in the index only, and a rebuilt one lacks them: the runs (with their plans, by which a new
run takes over a round in training), the `head` and `live` that a round under way began with, whether a judged version
was being promoted or discarded (it is judged again), and reasons that no event tells.
"""

import sqlite3
import zlib
from pathlib import Path

from server.registry import version_dir
from server.registry.round_log import SCHEMA as ROUNDS_SCHEMA
from server.registry.round_log import RoundLog, RoundState
from server.registry.round_recovery import recover
from umbel.adapter import AdapterManifest, AdapterRef
from umbel.errors import RegistryError

INDEX = "registry.sqlite"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS versions (
    name TEXT, version INTEGER, manifest TEXT NOT NULL, sums TEXT NOT NULL, PRIMARY KEY (name, version));
CREATE TABLE IF NOT EXISTS damaged (path TEXT PRIMARY KEY, reason TEXT NOT NULL);
"""
_EDITION = zlib.crc32((_SCHEMA + ROUNDS_SCHEMA).encode()) >> 1
"""Kept in SQLite's user_version: an index with other tables, or with none, is rebuilt."""


class VersionIndex:
    """The versions of one registry, and the database that its rounds share. Writers hold a `transaction`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        # Transactions are begun by hand, so that a version number is taken and used by one writer. A writer holds its
        # transaction while weights travel to the blob store, and the next one waits for it.
        self.database = sqlite3.connect(root / INDEX, timeout=600.0, isolation_level=None)
        try:
            self.database.execute("PRAGMA journal_mode = WAL")
            self.database.execute("PRAGMA synchronous = FULL")
        except sqlite3.DatabaseError as error:
            raise RegistryError(
                f"{root / INDEX}: {error}; end what uses the registry, delete {INDEX}*, and it is made anew from the "
                "files"
            ) from error
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

    def find(self, ref: AdapterRef) -> tuple[AdapterManifest, str] | None:
        """Return a version's manifest and SHA256SUMS as they were published; None for one that is not listed."""
        row = self.database.execute(
            "SELECT manifest, sums FROM versions WHERE name = ? AND version = ?", (ref.name, ref.version)
        ).fetchone()
        return None if row is None else (AdapterManifest.model_validate_json(row[0]), str(row[1]))

    def next_version(self, name: str) -> int:
        """Return one more than the highest version, damaged ones on disk included."""
        highest = self.database.execute("SELECT max(version) FROM versions WHERE name = ?", (name,)).fetchone()[0]
        on_disk = (int(path.name[1:]) for path in version_dir.every(self._root, name))
        return max([-1 if highest is None else int(highest), *on_disk]) + 1

    def add(self, manifest: AdapterManifest, sums: str) -> None:
        """List a version whose files are written."""
        row = (manifest.name, manifest.version, manifest.model_dump_json(), sums)
        self.database.execute("INSERT INTO versions VALUES (?, ?, ?, ?)", row)

    def unlisted(self) -> list[Path]:
        """Return the directories of versions that are not listed, as a killed publisher leaves them."""
        rows = self.database.execute("SELECT name, version FROM versions").fetchall()
        known = {version_dir.path(self._root, AdapterRef(*row)) for row in rows}
        known |= {self._root / path for path in self.damaged()}
        return [path for path in version_dir.every(self._root) if path not in known]

    def damaged(self) -> dict[str, str]:
        """Path in the registry → reason why the version there could not be listed when the index was built."""
        return dict(self.database.execute("SELECT path, reason FROM damaged ORDER BY path").fetchall())

    def take_up(self, path: Path, lineage: str) -> None:
        """List the version in a directory; raise RegistryError when it is damaged or of another registry."""
        manifest, sums = version_dir.read_manifest(path)
        if version_dir.path(self._root, manifest.ref) != path or manifest.lineage != lineage:
            raise RegistryError(f"{path}: holds {manifest.ref} of another registry; move it out of {self._root}")
        self.add(manifest, sums)
        record = self.rounds.find(manifest.name, manifest.round)
        if manifest.round and (record is None or record.version is None):
            self.rounds.record(
                manifest.name, manifest.round, manifest.run_id, RoundState.PUBLISHED, version=manifest.version,
                reasons=manifest.left_out,
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
        for path in self.unlisted():
            try:
                self.take_up(path, lineage)
            except RegistryError as error:
                row = (str(path.relative_to(self._root)), str(error))
                self.database.execute("INSERT INTO damaged VALUES (?, ?)", row)
                lost.append(f"not listed: {error}")
        for name in self.names():
            try:
                lost += recover(self.rounds, self._root, self.versions(name), known)
            except RegistryError as error:
                lost.append(f"rounds of {name}: {error}")
        self.database.execute(f"PRAGMA user_version = {_EDITION}")
        return lost
