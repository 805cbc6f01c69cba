"""`RoundJournal`: the part of a site's journal that remembers the rounds of training of one adapter."""

import sqlite3
import time

from umbel.errors import Conflict, NotFound
from umbel.messages import JobState, RoundOrder, RoundReport

BY_KEY = """
CREATE TABLE IF NOT EXISTS rounds (
    key TEXT PRIMARY KEY, adapter TEXT NOT NULL, state TEXT NOT NULL, job TEXT NOT NULL, report TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0, created REAL NOT NULL);
CREATE TABLE IF NOT EXISTS excused (key TEXT PRIMARY KEY, attempts INTEGER NOT NULL);
"""
"""The tables as they were while a site had one adapter."""
BY_ADAPTER_AND_KEY = """
ALTER TABLE rounds RENAME TO rounds_by_key;
CREATE TABLE rounds (
    adapter TEXT NOT NULL, key TEXT NOT NULL, state TEXT NOT NULL, job TEXT NOT NULL, report TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0, excused INTEGER NOT NULL DEFAULT 0, created REAL NOT NULL,
    PRIMARY KEY (adapter, key));
INSERT INTO rounds SELECT adapter, key, state, job, report, attempts,
    coalesce((SELECT attempts FROM excused WHERE excused.key = rounds_by_key.key), 0), created FROM rounds_by_key;
DROP TABLE rounds_by_key;
DROP TABLE excused;
"""
"""Makes the present table of those: two adapters of one registry can have the same key."""


class RoundJournal:
    """Rounds of an adapter by their keys, in the database of a `Journal`; each change is one transaction."""

    def __init__(self, database: sqlite3.Connection, adapter: str) -> None:
        self._db = database
        self._adapter = adapter

    def find(self, order: RoundOrder) -> RoundReport | None:
        """Return a round's report, None if it is not known; raise Conflict for the same key with another order."""
        row = self._row("job, report", order.key)
        if row is None:
            return None
        if RoundOrder.model_validate_json(row[0]) != order:
            raise Conflict(f"round {order.key} is already here with another parent or plan")
        return RoundReport.model_validate_json(row[1])

    def add(self, order: RoundOrder) -> RoundReport:
        """Enter a round, or find it again; raise Conflict for the same key with another order."""
        known = self.find(order)
        if known is not None:
            return known
        report = RoundReport(key=order.key, state=JobState.QUEUED, parent=order.parent)
        self._db.execute(
            "INSERT INTO rounds (adapter, key, state, job, report, created) VALUES (?, ?, ?, ?, ?, ?)",
            (self._adapter, order.key, report.state, order.model_dump_json(), report.model_dump_json(), time.time()),
        )
        return report

    def get(self, key: str) -> tuple[RoundOrder, RoundReport]:
        """Return a round's order and report; raise NotFound."""
        row = self._row("job, report", key)
        if row is None:
            raise NotFound(f"round {key} of {self._adapter} is not known at this site; submit it again")
        return RoundOrder.model_validate_json(row[0]), RoundReport.model_validate_json(row[1])

    def open(self) -> list[RoundOrder]:
        """Return the orders of rounds that have not ended, oldest first."""
        rows = self._db.execute(
            "SELECT job FROM rounds WHERE adapter = ? AND state IN (?, ?) ORDER BY created",
            (self._adapter, JobState.QUEUED, JobState.RUNNING),
        )
        return [RoundOrder.model_validate_json(job) for (job,) in rows]

    def finished(self) -> list[str]:
        """Return the keys of rounds that have ended, newest first."""
        rows = self._db.execute(
            "SELECT key FROM rounds WHERE adapter = ? AND state NOT IN (?, ?) ORDER BY created DESC",
            (self._adapter, JobState.QUEUED, JobState.RUNNING),
        )
        return [key for (key,) in rows]

    def done(self) -> list[tuple[RoundOrder, RoundReport]]:
        """Return the orders and reports of rounds that brought an update, oldest first."""
        rows = self._db.execute(
            "SELECT job, report FROM rounds WHERE adapter = ? AND state = ? ORDER BY created",
            (self._adapter, JobState.DONE),
        )
        return [(RoundOrder.model_validate_json(job), RoundReport.model_validate_json(report)) for job, report in rows]

    def report(self, report: RoundReport) -> None:
        """Replace the report of a round, which is found by the report's key."""
        self._db.execute(
            "UPDATE rounds SET state = ?, report = ? WHERE adapter = ? AND key = ?",
            (report.state, report.model_dump_json(), self._adapter, report.key),
        )

    def begin_attempt(self, key: str) -> int:
        """Count an attempt at a round; return the number of attempts so far, without those that were excused."""
        self._count("attempts", key)
        return self.begun(key) - self._number("excused", key)

    def excuse_attempt(self, key: str, most: int) -> bool:
        """Let the last attempt at a round not count; return False, and change nothing, once `most` do not."""
        if self._number("excused", key) >= most:
            return False
        self._count("excused", key)
        return True

    def begun(self, key: str) -> int:
        """Return the number of all attempts at a round."""
        return self._number("attempts", key)

    def _row(self, columns: str, key: str) -> tuple[str, ...] | None:
        query = f"SELECT {columns} FROM rounds WHERE adapter = ? AND key = ?"  # noqa: S608
        row: tuple[str, ...] | None = self._db.execute(query, (self._adapter, key)).fetchone()
        return row

    def _number(self, column: str, key: str) -> int:
        row = self._row(column, key)
        return int(row[0]) if row else 0

    def _count(self, column: str, key: str) -> None:
        query = f"UPDATE rounds SET {column} = {column} + 1 WHERE adapter = ? AND key = ?"  # noqa: S608
        self._db.execute(query, (self._adapter, key))


def lineage_of(order: RoundOrder) -> str:
    """Return the part of a round's key that identifies the registry."""
    return order.key.partition(f"-{order.round}-")[0]


def known_rounds(database: sqlite3.Connection) -> list[tuple[str, str]]:
    """Return (adapter, key) of all rounds of all adapters."""
    return database.execute("SELECT adapter, key FROM rounds").fetchall()
