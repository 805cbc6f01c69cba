"""`ImportedJournal`: the adapters that are only served, in the site's journal; one row for each name."""

import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umbel.adapter import ServedRef

SCHEMA = """
CREATE TABLE IF NOT EXISTS imported (
    name TEXT PRIMARY KEY, digest TEXT NOT NULL, source TEXT NOT NULL, path TEXT NOT NULL, rank INTEGER NOT NULL,
    listed INTEGER NOT NULL, since REAL NOT NULL);
"""
_COLUMNS = "name, digest, source, path, rank, listed, since"


@dataclass(frozen=True)
class Imported:
    """One adapter that is only served, as the site keeps it."""

    name: str
    digest: str
    """sha256 of its weights as the engine loads them."""
    source: str
    """sha256 of the files that it was made from."""
    path: Path
    """The PEFT directory with those files."""
    rank: int
    listed: bool
    """True if it stands in the site file, under [[serve]]."""
    since: float
    """Unix time from which on it has answered under this name."""

    @property
    def ref(self) -> ServedRef:
        """Its name in the alias table and in the engine."""
        return ServedRef.of(self.name, self.digest)

    @property
    def shown(self) -> dict[str, Any]:
        """Name, digest, path and since as JSON values, for `umbel status`."""
        return {"name": self.name, "digest": self.digest, "path": str(self.path), "since": self.since}


class ImportedJournal:
    """A part of the journal; each change is one statement, and so one transaction."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._db = database

    def all(self) -> list[Imported]:
        """Return every entry, by name."""
        rows = self._db.execute(f"SELECT {_COLUMNS} FROM imported ORDER BY name")  # noqa: S608 - a constant
        return [
            Imported(name, digest, source, Path(path), rank, bool(listed), since)
            for name, digest, source, path, rank, listed, since in rows.fetchall()
        ]

    def find(self, name: str) -> Imported | None:
        """Return the entry of a name, or None."""
        return next((entry for entry in self.all() if entry.name == name), None)

    def put(self, entry: Imported) -> None:
        """Enter an adapter, in place of the one of that name."""
        self._db.execute(
            "INSERT OR REPLACE INTO imported VALUES (?, ?, ?, ?, ?, ?, ?)",
            (entry.name, entry.digest, entry.source, str(entry.path), entry.rank, entry.listed, entry.since),
        )

    def remove(self, name: str) -> None:
        """Forget the adapter of a name."""
        self._db.execute("DELETE FROM imported WHERE name = ?", (name,))
