"""`RoundLog`: the state of every round, kept in the registry's index; an interrupted federation goes on from it.

The log is the record that is read and written all the time. `server/registry/round_recovery.py` is used only when the
index is rebuilt: it fills the log from the registry's files.
"""

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from umbel.transaction import transaction

SCHEMA = """
CREATE TABLE IF NOT EXISTS rounds (
    name TEXT, round INTEGER, run_id TEXT NOT NULL, state TEXT NOT NULL, version INTEGER, reasons TEXT NOT NULL,
    at TEXT NOT NULL, PRIMARY KEY (name, round));
CREATE TABLE IF NOT EXISTS runs (
    run_id TEXT, name TEXT, first_round INTEGER NOT NULL, plan TEXT NOT NULL, PRIMARY KEY (run_id, name));
CREATE TABLE IF NOT EXISTS expectations (name TEXT, round INTEGER, aliases TEXT NOT NULL, PRIMARY KEY (name, round));
"""


class RoundState(StrEnum):
    """The progress of a round; a state is recorded before the next step begins."""

    TRAINING = "training"
    PUBLISHED = "published"  # its version is in the registry, not judged yet
    PROMOTING = "promoting"  # accepted by a quorum; on its way to the sites
    DISCARDING = "discarding"  # not accepted; being unloaded at the sites
    PROMOTED = "promoted"
    REJECTED = "rejected"
    FAILED = "failed"  # ended without a version
    IDLE = "idle"  # ended without a version, because no site had anything worth training

    @property
    def final(self) -> bool:
        return self in (RoundState.PROMOTED, RoundState.REJECTED, RoundState.FAILED, RoundState.IDLE)


@dataclass(frozen=True)
class RoundRecord:
    """One round of one adapter."""

    name: str
    round: int
    run_id: str
    state: RoundState
    version: int | None
    """Number of the version that the round made."""
    reasons: dict[str, str]
    """Site → reason why it was left out, skipped the round, or for its verdict; "*" for the round as a whole."""
    at: str
    """Time of the last change; ISO 8601, UTC."""


class RoundLog:
    """Rounds and runs, in the registry's database."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database

    def begin_run(self, run_id: str, name: str, plan: str) -> int:
        """Return the first round of a run: a new run starts after all others, an interrupted one keeps its rounds.

        Flower does not start a killed ServerApp again, its operator does, as a new run. A round that an earlier run
        left in training is therefore taken over, as the first of the new one, if both have the same `plan`: the sites
        know it by its key and go on. Otherwise it is closed as failed.
        """
        with transaction(self._database):
            known = self._database.execute(
                "SELECT first_round FROM runs WHERE run_id = ? AND name = ?", (run_id, name)
            ).fetchone()
            if known is not None:
                return int(known[0])
            first = self._take_over(name, plan)
            self._database.execute("INSERT INTO runs VALUES (?, ?, ?, ?)", (run_id, name, first, plan))
        return first

    def _take_over(self, name: str, plan: str) -> int:
        """Return the round that was left in training, or else the first number that no run has used."""
        every = self.all(name)
        left = [record for record in every if record.state is RoundState.TRAINING]
        for record in left:
            same = self._database.execute(
                "SELECT 1 FROM runs WHERE run_id = ? AND name = ? AND plan = ?", (record.run_id, name, plan)
            ).fetchone()
            if same and record is every[-1]:
                return record.round
            reason = f"run {record.run_id} ended while it was in training"
            self.record(name, record.round, record.run_id, RoundState.FAILED, reasons={"*": reason})
        return every[-1].round + 1 if every else 1

    def record(
        self,
        name: str,
        number: int,
        run_id: str,
        state: RoundState,
        *,
        version: int | None = None,
        reasons: Mapping[str, str] | None = None,
    ) -> None:
        """Store a round's new state; its version stays, and new reasons are added to the earlier ones."""
        old = self.find(name, number)
        if old is not None:
            version = old.version if version is None else version
            reasons = _added(old.reasons, reasons or {})
        self._database.execute(
            "INSERT OR REPLACE INTO rounds VALUES (?, ?, ?, ?, ?, ?, ?)",
            (name, number, run_id, state, version, json.dumps(dict(reasons or {})), now()),
        )

    def forget(self, name: str, but: set[tuple[str, int]]) -> None:
        """Remove an adapter's rounds, but those in `but`, as (name, round)."""
        for record in self.all(name):
            if (name, record.round) not in but:
                self._database.execute("DELETE FROM rounds WHERE name = ? AND round = ?", (name, record.round))

    def expect(self, name: str, number: int, aliases: Mapping[str, int]) -> None:
        """Store the aliases as a round begins; one that differs at the round's end was moved by an operator."""
        row = (name, number, json.dumps(dict(aliases)))
        self._database.execute("INSERT OR REPLACE INTO expectations VALUES (?, ?, ?)", row)

    def expected(self, name: str, number: int) -> dict[str, int]:
        """Return alias → version as the round began; empty where that is not known."""
        query = "SELECT aliases FROM expectations WHERE name = ? AND round = ?"
        row = self._database.execute(query, (name, number)).fetchone()
        return {} if row is None else json.loads(row[0])

    def find(self, name: str, number: int) -> RoundRecord | None:
        """One round, or None if it was never begun."""
        row = self._database.execute("SELECT * FROM rounds WHERE name = ? AND round = ?", (name, number)).fetchone()
        return None if row is None else _record(row)

    def all(self, name: str) -> list[RoundRecord]:
        """Every round of an adapter, in order."""
        rows = self._database.execute("SELECT * FROM rounds WHERE name = ? ORDER BY round", (name,)).fetchall()
        return [_record(row) for row in rows]


def _added(old: Mapping[str, str], new: Mapping[str, str]) -> dict[str, str]:
    """Join the reasons of both; a reason that is repeated after an interruption stands once."""
    told = {
        who: f"{old[who]}; {why}" if who in old and why not in old[who] else old.get(who, why)
        for who, why in new.items()
    }
    return {**old, **told}


def _record(row: tuple[str, int, str, str, int | None, str, str]) -> RoundRecord:
    name, number, run_id, state, version, reasons, at = row
    return RoundRecord(name, number, run_id, RoundState(state), version, json.loads(reasons), at)


def now() -> str:
    """Return the time, ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")
