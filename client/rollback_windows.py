"""`RollbackWindows`: promotions that a site still watches, in its journal, to roll one back that serves users worse."""

import sqlite3
from dataclasses import dataclass, field

from serving.traffic_report import VersionTraffic
from umbel.adapter import AdapterRef

SCHEMA = """
CREATE TABLE IF NOT EXISTS promotions (
    adapter TEXT PRIMARY KEY, version INTEGER NOT NULL, instead_of INTEGER, at REAL NOT NULL, before TEXT NOT NULL);
"""


@dataclass(frozen=True)
class Promotion:
    """A recent promotion: the version still is compared with what answered before, and may be rolled back."""

    ref: AdapterRef
    instead_of: AdapterRef | None
    """The incumbent that it replaced; None: the base."""
    at: float
    """Unix time."""
    before: VersionTraffic
    """Users' traffic with `instead_of` until then."""
    already: VersionTraffic = field(default_factory=VersionTraffic)
    """Traffic that the running engine had answered with `ref` by then, as a shadow. Not stored in the journal."""


class RollbackWindows:
    """Open roll-back windows, in the database of a `Journal`: at most one of each adapter."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._db = database

    def begin(self, promotion: Promotion) -> None:
        """Remember a promotion, in the place of an earlier one of the same adapter."""
        before = promotion.instead_of.version if promotion.instead_of else None
        self._db.execute(
            "INSERT OR REPLACE INTO promotions VALUES (?, ?, ?, ?, ?)",
            (promotion.ref.name, promotion.ref.version, before, promotion.at, promotion.before.model_dump_json()),
        )

    def end(self, ref: AdapterRef) -> None:
        """Forget the promotion of `ref`: it stands or was rolled back, and is not compared any more."""
        self._db.execute("DELETE FROM promotions WHERE adapter = ? AND version = ?", (ref.name, ref.version))

    def open(self) -> list[Promotion]:
        """Return the promotions that still are compared with what answered before."""
        rows = self._db.execute("SELECT adapter, version, instead_of, at, before FROM promotions").fetchall()
        return [
            Promotion(
                AdapterRef(name, version),
                AdapterRef(name, instead_of) if instead_of is not None else None,
                at,
                VersionTraffic.model_validate_json(before),
            )
            for name, version, instead_of, at, before in rows
        ]
