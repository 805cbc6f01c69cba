"""`RoundJournal`: the part of a site's journal that remembers its rounds of training."""

import sqlite3
import time

from umbel.errors import Conflict, NotFound
from umbel.messages import JobState, RoundOrder, RoundReport

SCHEMA = """
CREATE TABLE IF NOT EXISTS rounds (
    key TEXT PRIMARY KEY, adapter TEXT NOT NULL, state TEXT NOT NULL, job TEXT NOT NULL, report TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0, created REAL NOT NULL);
CREATE TABLE IF NOT EXISTS excused (key TEXT PRIMARY KEY, attempts INTEGER NOT NULL);
"""


class RoundJournal:
    """Rounds by their keys, in the database of a `Journal`; each change is one transaction."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._db = database

    def find(self, order: RoundOrder) -> RoundReport | None:
        """Return a round's report, None if it is not known; raise Conflict for the same key with another order."""
        row = self._db.execute("SELECT job, report FROM rounds WHERE key = ?", (order.key,)).fetchone()
        if row is None:
            return None
        if RoundOrder.model_validate_json(row[0]) != order:
            raise Conflict(f"round {order.key} is already here with another parent or plan")
        return RoundReport.model_validate_json(row[1])

    def add(self, adapter: str, order: RoundOrder) -> RoundReport:
        """Enter a round, or find it again; raise Conflict for the same key with another order."""
        known = self.find(order)
        if known is not None:
            return known
        report = RoundReport(key=order.key, state=JobState.QUEUED, parent=order.parent)
        self._db.execute(
            "INSERT INTO rounds VALUES (?, ?, ?, ?, ?, 0, ?)",
            (order.key, adapter, report.state, order.model_dump_json(), report.model_dump_json(), time.time()),
        )
        return report

    def get(self, key: str) -> tuple[RoundOrder, RoundReport]:
        """Return a round's order and report; raise NotFound."""
        row = self._db.execute("SELECT job, report FROM rounds WHERE key = ?", (key,)).fetchone()
        if row is None:
            raise NotFound(f"round {key} is not known at this site; submit it again")
        return RoundOrder.model_validate_json(row[0]), RoundReport.model_validate_json(row[1])

    def adapter_of(self, key: str) -> str:
        """Return the name of the adapter that a round trains; raise NotFound."""
        row = self._db.execute("SELECT adapter FROM rounds WHERE key = ?", (key,)).fetchone()
        if row is None:
            raise NotFound(f"round {key} is not known at this site; submit it again")
        return str(row[0])

    def open(self, adapter: str | None = None) -> list[RoundOrder]:
        """Return the orders of rounds that have not ended, oldest first; of one adapter, or of all."""
        rows = self._db.execute(
            "SELECT job FROM rounds WHERE state IN (?, ?) AND adapter = coalesce(?, adapter) ORDER BY created",
            (JobState.QUEUED, JobState.RUNNING, adapter),
        )
        return [RoundOrder.model_validate_json(job) for (job,) in rows]

    def finished(self) -> list[str]:
        """Return the keys of rounds that have ended, newest first."""
        rows = self._db.execute(
            "SELECT key FROM rounds WHERE state NOT IN (?, ?) ORDER BY created DESC",
            (JobState.QUEUED, JobState.RUNNING),
        )
        return [key for (key,) in rows]

    def known(self) -> list[str]:
        """Return the keys of all rounds."""
        return [key for (key,) in self._db.execute("SELECT key FROM rounds")]

    def report(self, report: RoundReport) -> None:
        """Replace the report of a round, which is found by the report's key."""
        self._db.execute(
            "UPDATE rounds SET state = ?, report = ? WHERE key = ?",
            (report.state, report.model_dump_json(), report.key),
        )

    def begin_attempt(self, key: str) -> int:
        """Count an attempt at a round; return the number of attempts so far, without those that were excused."""
        self._db.execute("UPDATE rounds SET attempts = attempts + 1 WHERE key = ?", (key,))
        return self.begun(key) - self._excused(key)

    def excuse_attempt(self, key: str, most: int) -> bool:
        """Let the last attempt at a round not count; return False, and change nothing, once `most` do not."""
        if self._excused(key) >= most:
            return False
        self._db.execute(
            "INSERT INTO excused VALUES (?, 1) ON CONFLICT (key) DO UPDATE SET attempts = attempts + 1", (key,)
        )
        return True

    def begun(self, key: str) -> int:
        """Return the number of all attempts at a round."""
        return int(self._db.execute("SELECT attempts FROM rounds WHERE key = ?", (key,)).fetchone()[0])

    def _excused(self, key: str) -> int:
        row = self._db.execute("SELECT attempts FROM excused WHERE key = ?", (key,)).fetchone()
        return int(row[0]) if row else 0
