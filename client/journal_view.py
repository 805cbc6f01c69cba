"""Read-only queries on the journal, usable while the daemon runs or without it, in either environment.

Each query opens a connection that cannot write; SQLite's WAL lets it read while the daemon writes.
"""

import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from client.heldout_looks import HeldoutLooks, Look
from client.imported.journal import ImportedJournal
from client.journal import LIVE_AGAIN, TAKEN_BACK
from umbel.adapter import AdapterRef, Lifecycle
from umbel.errors import ConfigError
from umbel.messages import JobState
from umbel.site.config import SiteConfig

ROLL_BACKS = (LIVE_AGAIN, TAKEN_BACK)
"""The journal's events of a roll-back."""
SHOWN_ROLL_BACKS = 3
ONE_CHANGE_S = 1.0
"""Events of one version within these seconds belong to one change: first its state, then the reason."""

Event = tuple[float, str, int]
"""(Unix time, event, version)."""


def read(path: Path, adapters: Iterable[str]) -> dict[str, Any]:
    """Return the part of `umbel status` that is in the journal, as JSON values.

    Raises OSError without a journal, ConfigError for one that cannot be read.
    """
    with _opened(path) as database:
        return _read(database, list(adapters))


def next_look(path: Path, adapter: str, heldout: str) -> Look:
    """Return the look that the next verdict on an adapter will be, by the held-out examples of that digest.

    Raises as `read` does.
    """
    with _opened(path) as database:
        return HeldoutLooks(database).next(adapter, heldout)


def without_daemon(config: SiteConfig) -> dict[str, Any]:
    """Return the status of a site whose daemon does not run; raise OSError when none ever ran."""
    names = config.adapters
    return {
        "site": config.site.name,
        "running": False,
        "engine": {"ready": False, "starts": 0, "since": None, "url": None},
        **read(config.site.state_dir / "journal.sqlite3", names),
        "in_flight": {},
        "training": None,
        "training_shares": {},
        "running_rounds": {},
        "data": {},
        "heldout_looks": {},
        "worth": {},
    }


@contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    """Give a connection that cannot write, and one snapshot for all its queries."""
    try:
        with path.open("rb"), closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            database.execute("BEGIN")
            yield database
    except sqlite3.DatabaseError as error:
        raise ConfigError(f"{path}: cannot be read ({error}); restore {path.parent} from your backup") from error


def _read(database: sqlite3.Connection, names: list[str]) -> dict[str, Any]:
    rows = list(database.execute("SELECT adapter, version, state, report FROM versions ORDER BY adapter, version"))
    states = {(adapter, version): state for adapter, version, state, _ in rows}
    aliases = {name: _aliases(database, name, states) for name in names}
    return {
        "versions": {str(AdapterRef(adapter, version)): json.loads(report) for adapter, version, _, report in rows},
        "aliases": aliases,
        "history": {name: _history(database, name, limit=10) for name in names},
        "answering": {name: _answering(database, name, aliases[name]["live"]) for name in names},
        "roll_backs": {name: _history(database, name, ROLL_BACKS, limit=SHOWN_ROLL_BACKS) for name in names},
        "events": {name: _events(database, name) for name in names},
        "served": _served(database),
        **_rounds(database),
    }


def _served(database: sqlite3.Connection) -> list[dict[str, Any]]:
    """Return name, digest, path and since of each adapter that is only served."""
    if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'imported'").fetchone():
        return []  # the journal of a daemon before there were any
    return [entry.shown for entry in ImportedJournal(database).all()]


def _aliases(database: sqlite3.Connection, adapter: str, states: dict[tuple[str, int], str]) -> dict[str, str | None]:
    found = dict(database.execute("SELECT alias, version FROM aliases WHERE adapter = ?", (adapter,)).fetchall())
    shadows = [version for (name, version), state in states.items() if name == adapter and Lifecycle(state).is_shadow]
    found["shadow"] = shadows[-1] if shadows else None
    known = {alias: found.get(alias) for alias in ("live", "previous", "shadow")}
    return {alias: None if version is None else str(AdapterRef(adapter, version)) for alias, version in known.items()}


def _history(database: sqlite3.Connection, adapter: str, events: tuple[str, ...] = (), *, limit: int) -> list[Event]:
    """Return the last `limit` events of an adapter, newest first; only those in `events`, if any are given."""
    only = f"AND event IN ({', '.join('?' * len(events))})" if events else ""
    query = f"SELECT at, event, version FROM history WHERE adapter = ? {only} ORDER BY at DESC, rowid DESC LIMIT ?"  # noqa: S608
    return database.execute(query, (adapter, *events, limit)).fetchall()


def _answering(database: sqlite3.Connection, adapter: str, live: str | None) -> dict[str, Any]:
    """Return the time since which the present version answers, and the event that began it.

    It began when a version last became live or, where the base answers, when a version last ceased to be live. Both
    are null where no version was ever live.
    """
    state = Lifecycle.LIVE if live else Lifecycle.RETIRED
    began = database.execute(
        "SELECT rowid, at, version FROM history WHERE adapter = ? AND event = ? ORDER BY rowid DESC LIMIT 1",
        (adapter, state),
    ).fetchone()
    if began is None:
        return {"since": None, "event": None}
    row, at, version = began
    why = database.execute(
        "SELECT event FROM history WHERE adapter = ? AND version = ? AND rowid > ? AND at < ? ORDER BY rowid LIMIT 1",
        (adapter, version, row, at + ONE_CHANGE_S),
    ).fetchone()
    return {"since": at, "event": why[0] if why else state}


def _events(database: sqlite3.Connection, adapter: str) -> dict[str, int]:
    """Return each event of an adapter → its count since the journal began."""
    query = "SELECT event, count(*) FROM history WHERE adapter = ? GROUP BY event ORDER BY event"
    return dict(database.execute(query, (adapter,)).fetchall())


def _rounds(database: sqlite3.Connection) -> dict[str, Any]:
    """Return the open rounds as `adapter/key`, the number of ended ones by state, and the tokens with a loss in those.

    The query is one that a journal of before several adapters answers, too.
    """
    rows = database.execute(
        "SELECT state, count(*), sum(json_extract(report, '$.num_loss_tokens')) FROM rounds GROUP BY state"
    )
    ended = {state: (count, tokens) for state, count, tokens in rows if JobState(state).final}
    waiting = database.execute(
        "SELECT adapter, key FROM rounds WHERE state IN (?, ?) ORDER BY created", (JobState.QUEUED, JobState.RUNNING)
    )
    return {
        "open_rounds": [f"{adapter}/{key}" for adapter, key in waiting],
        "rounds": {state: count for state, (count, _) in ended.items()},
        "trained_tokens": sum(tokens for _, tokens in ended.values()),
    }
