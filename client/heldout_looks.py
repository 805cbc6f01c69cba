"""`HeldoutLooks`: how often a site has judged versions by the same held-out examples, in its journal.

Each verdict is one more chance for a version that is no better to look better by luck, so each may err less: the first
has 61 % of the allowed error, the second 15 %, the k-th 6 / (π k)². A promotion restores it, so that real progress
costs no power; of N promotions about α (N + 1) are by luck (α investing: Foster & Stine, Journal of the Royal
Statistical Society B 70, 2008).
"""

import math
import sqlite3
from dataclasses import dataclass

SCHEMA = """
CREATE TABLE IF NOT EXISTS heldout_looks (
    adapter TEXT NOT NULL, heldout TEXT NOT NULL, verdicts INTEGER NOT NULL, since INTEGER NOT NULL,
    PRIMARY KEY (adapter, heldout));
"""
MANY = 10
"""Looks since a promotion after which a gain has to be 1.7 times as large as at the first look to promote."""


@dataclass(frozen=True)
class Look:
    """A verdict on a version of an adapter, as one of several by the same held-out examples."""

    number: int = 1
    """1 for the first verdict by these examples."""
    since: int = 1
    """1 for the first verdict by them, and for the first after one that promoted."""

    def level(self, alpha: float) -> float:
        """Return this look's part of the probability `alpha` of a promotion by luck; all parts together are `alpha`."""
        return alpha * 6 / (math.pi * self.since) ** 2

    def due(self, alpha: float) -> bool:
        """Return whether other held-out examples are due before this look.

        They are when there were about as many verdicts as one error allows, or MANY since a promotion.
        """
        return self.number * alpha >= 1 or self.since > MANY


class HeldoutLooks:
    """Numbers of verdicts by adapter and digest of the held-out examples, in the database of a `Journal`."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._db = database

    def next(self, adapter: str, heldout: str) -> Look:
        """Return the look that the next verdict will be."""
        row = self._db.execute(
            "SELECT verdicts, since FROM heldout_looks WHERE adapter = ? AND heldout = ?", (adapter, heldout)
        ).fetchone()
        return Look(row[0] + 1, row[1] + 1) if row else Look()

    def count(self, adapter: str, heldout: str, *, promoted: bool) -> None:
        """Count a verdict; within the transaction that notes it."""
        look = self.next(adapter, heldout)
        self._db.execute(
            "INSERT OR REPLACE INTO heldout_looks VALUES (?, ?, ?, ?)",
            (adapter, heldout, look.number, 0 if promoted else look.since),
        )
