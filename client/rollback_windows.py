"""`RollbackWindows`: promotions that a site still watches, in its journal, to roll one back that serves users worse."""

import sqlite3
from dataclasses import dataclass, field

from serving.traffic_report import VersionTraffic
from umbel.adapter import AdapterRef

SCHEMA = """
CREATE TABLE IF NOT EXISTS rollback_windows (
    adapter TEXT PRIMARY KEY, version INTEGER NOT NULL, instead_of INTEGER, at REAL NOT NULL);
"""


@dataclass(frozen=True)
class Promotion:
    """A recent promotion: the version still is compared with what answered before, and may be rolled back."""

    ref: AdapterRef
    instead_of: AdapterRef | None
    """The incumbent that it replaced; None: the base."""
    at: float
    """Unix time."""
    before: VersionTraffic = field(default_factory=VersionTraffic)
    """Traffic that the running engine had answered with `instead_of` by then. Not stored in the journal."""
    already: VersionTraffic = field(default_factory=VersionTraffic)
    """Traffic that it had answered with `ref` by then, as a shadow. Not stored in the journal either."""


class RollbackWindows:
    """Open roll-back windows, in the database of a `Journal`: at most one of each adapter."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._db = database

    def begin(self, promotion: Promotion) -> None:
        """Remember a promotion, in the place of an earlier one of the same adapter."""
        before = promotion.instead_of.version if promotion.instead_of else None
        self._db.execute(
            "INSERT OR REPLACE INTO rollback_windows VALUES (?, ?, ?, ?)",
            (promotion.ref.name, promotion.ref.version, before, promotion.at),
        )

    def end(self, ref: AdapterRef) -> None:
        """Forget the promotion of `ref`: it stands or was rolled back, and is not compared any more."""
        self._db.execute("DELETE FROM rollback_windows WHERE adapter = ? AND version = ?", (ref.name, ref.version))

    def open(self) -> list[Promotion]:
        """Return the promotions that still are compared with what answered before."""
        rows = self._db.execute("SELECT adapter, version, instead_of, at FROM rollback_windows").fetchall()
        return [
            Promotion(
                AdapterRef(name, version),
                AdapterRef(name, instead_of) if instead_of is not None else None,
                at,
            )
            for name, version, instead_of, at in rows
        ]
