"""The site's memory: one SQLite file that says which versions there are, which is live, and which rounds are under way.

The alias table and everything else on disk is derived from it. Each change is one transaction (WAL, synchronous=FULL):
after a crash at any line the file holds the state before the change or after it.
"""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from client import round_journal
from client.round_journal import RoundJournal
from serving.traffic_report import VersionTraffic
from umbel.adapter import AdapterManifest, AdapterRef, Lifecycle
from umbel.errors import Conflict, JournalError, NotFound
from umbel.messages import ShadowReport, ShadowState

SCHEMA = """
CREATE TABLE IF NOT EXISTS versions (
    adapter TEXT NOT NULL, version INTEGER NOT NULL, digest TEXT NOT NULL, state TEXT NOT NULL,
    manifest TEXT NOT NULL, report TEXT NOT NULL, changed REAL NOT NULL, PRIMARY KEY (adapter, version));
CREATE TABLE IF NOT EXISTS aliases (
    adapter TEXT NOT NULL, alias TEXT NOT NULL, version INTEGER NOT NULL, PRIMARY KEY (adapter, alias));
CREATE TABLE IF NOT EXISTS promotions (
    adapter TEXT PRIMARY KEY, version INTEGER NOT NULL, instead_of INTEGER, at REAL NOT NULL, before TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS history (at REAL NOT NULL, adapter TEXT NOT NULL, event TEXT NOT NULL, version INTEGER);
"""

ROLLED_BACK = "rolled back"
TAKEN_BACK = "taken back: the base answers"
"""What the history says of a version that this site itself went back from: to the one before, or to the base."""
LIVE_AGAIN = "live again by roll-back"
"""Of the version that it went back to."""
BY_ITSELF = "rolled back by itself: "
"""Of a version that users were served worse by; the reason follows."""


@dataclass(frozen=True)
class Version:
    """One adapter version as the site knows it."""

    manifest: AdapterManifest
    state: Lifecycle
    report: ShadowReport

    @property
    def ref(self) -> AdapterRef:
        return self.manifest.ref


@dataclass(frozen=True)
class Promotion:
    """A version that answers users since a moment ago, and is still compared with what answered before."""

    ref: AdapterRef
    instead_of: AdapterRef | None
    """None: the base."""
    at: float
    """Unix time."""
    before: VersionTraffic
    """What users got of `instead_of`."""
    already: VersionTraffic = field(default_factory=VersionTraffic)
    """What the engine that runs now had answered with `ref` by then, as a shadow. Not kept: it dies with the daemon."""


class Journal:
    """The only writer of `journal.sqlite3`."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None)
        try:
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            found = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
            self._db.executescript(SCHEMA + round_journal.SCHEMA)
            self.versions()
        except sqlite3.DatabaseError as error:
            raise _damaged(path, str(error)) from error
        except ValueError as error:
            raise _damaged(path, "the entry of a version cannot be read") from error
        if found != "ok":
            raise _damaged(path, found)
        self.rounds = RoundJournal(self._db)

    def close(self) -> None:
        self._db.close()

    def add(self, manifest: AdapterManifest, report: ShadowReport) -> None:
        """Enter a candidate; raise Conflict when its name and number are taken by other weights."""
        known = self.find(manifest.ref)
        if known is not None:
            if known.manifest.digest != manifest.digest:
                raise Conflict(f"{manifest.ref} is already here with other weights; a version is never used twice")
            return
        with self._transaction():
            self._db.execute(
                "INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?, ?)",
                (manifest.name, manifest.version, manifest.digest, Lifecycle.CANDIDATE, manifest.model_dump_json(),
                 report.model_dump_json(), time.time()),
            )  # fmt: skip
            self._note(manifest.ref, "candidate")

    def find(self, ref: AdapterRef) -> Version | None:
        rows = self._versions("WHERE adapter = ? AND version = ?", ref.name, ref.version)
        return rows[0] if rows else None

    def get(self, ref: AdapterRef) -> Version:
        """A known version; raise NotFound otherwise."""
        version = self.find(ref)
        if version is None:
            raise NotFound(f"{ref} is not known at this site; push it as a shadow first")
        return version

    def versions(self, *states: Lifecycle) -> list[Version]:
        """All versions, or those in one of `states`, oldest first."""
        return [
            version for version in self._versions("ORDER BY adapter, version") if not states or version.state in states
        ]

    def move(self, ref: AdapterRef, state: Lifecycle, report: ShadowReport | None = None) -> None:
        """Take one version to another state of its life, with what is now known of it."""
        known = self.get(ref)
        with self._transaction():
            self._move(known, known.state.to(state), report or known.report)

    def report(self, ref: AdapterRef, report: ShadowReport, event: str = "") -> None:
        """Note what a probe has brought, and in the history that it did."""
        with self._transaction():
            self._db.execute(
                "UPDATE versions SET report = ? WHERE adapter = ? AND version = ?",
                (report.model_dump_json(), ref.name, ref.version),
            )
            if event:
                self._note(ref, event)

    def make_live(
        self, ref: AdapterRef, report: ShadowReport, old_report: ShadowReport | None, event: str, left: str = ""
    ) -> None:
        """The promotion (or roll-back): `ref` is live, what was live is previous; one transaction.

        `left` is noted of what was live, such as ROLLED_BACK. Where the base answered, nothing is previous: to go back
        is to go back to the base.
        """
        known, live = self.get(ref), self.alias(ref.name, "live")
        state = known.state.to(Lifecycle.LIVE)
        with self._transaction():
            if live is not None:
                old = self.get(live)
                self._move(old, old.state.to(Lifecycle.RETIRED), old_report or old.report)
                self._point(ref.name, "previous", live)
                if left:
                    self._note(live, left)
            else:
                self._db.execute("DELETE FROM aliases WHERE adapter = ? AND alias = 'previous'", (ref.name,))
            self._move(known, state, report)
            self._point(ref.name, "live", ref)
            self._note(ref, event)

    def forget(self, ref: AdapterRef, event: str) -> None:
        """Take a version out, as if it had never come; what was live before it, or the base, answers in its place.

        One transaction. It may be pushed again. What this site went back from does not answer again by such a damage.
        """
        live, previous = self.alias(ref.name, "live"), self.alias(ref.name, "previous")
        if previous in self.refused(ref.name, limit=-1):
            previous = None
        with self._transaction():
            self._db.execute("DELETE FROM versions WHERE adapter = ? AND version = ?", (ref.name, ref.version))
            self._db.execute("DELETE FROM aliases WHERE adapter = ? AND version = ?", (ref.name, ref.version))
            self._note(ref, event)
            if ref == live and previous is not None:
                heir = self.get(previous)
                report = heir.report.model_copy(update={"state": ShadowState.LIVE})
                self._db.execute("DELETE FROM aliases WHERE adapter = ? AND alias = 'previous'", (ref.name,))
                self._move(heir, heir.state.to(Lifecycle.LIVE), report)
                self._point(ref.name, "live", previous)

    def make_base_live(self, live: AdapterRef, report: ShadowReport, event: str = TAKEN_BACK) -> None:
        """The roll-back of a first version: the base answers again, `live` is previous; one transaction."""
        old = self.get(live)
        with self._transaction():
            self._move(old, old.state.to(Lifecycle.RETIRED), report)
            self._point(live.name, "previous", live)
            self._db.execute("DELETE FROM aliases WHERE adapter = ? AND alias = 'live'", (live.name,))
            self._note(live, event)

    def alias(self, adapter: str, alias: str) -> AdapterRef | None:
        row = self._db.execute(
            "SELECT version FROM aliases WHERE adapter = ? AND alias = ?", (adapter, alias)
        ).fetchone()
        return AdapterRef(adapter, row[0]) if row else None

    def note(self, ref: AdapterRef, event: str) -> None:
        """Enter something into the history of a version."""
        with self._transaction():
            self._note(ref, event)

    def history(self, adapter: str, limit: int = 10) -> list[tuple[float, str, int]]:
        """(unix time, event, version), newest first."""
        return self._db.execute(
            "SELECT at, event, version FROM history WHERE adapter = ? ORDER BY at DESC LIMIT ?", (adapter, limit)
        ).fetchall()

    def refused(self, adapter: str, limit: int = 20) -> list[AdapterRef]:
        """Versions that this site rejected, or went back from by itself and not to again; newest first, -1: all."""
        rows = self._db.execute(
            "SELECT version, event, max(rowid) AS last FROM history WHERE adapter = ? AND event IN (?, ?, ?, ?) "
            "GROUP BY version ORDER BY last DESC",
            (adapter, Lifecycle.REJECTED, ROLLED_BACK, TAKEN_BACK, Lifecycle.LIVE),
        ).fetchall()
        refs = [AdapterRef(adapter, version) for version, event, _ in rows if event != Lifecycle.LIVE]
        return refs if limit < 0 else refs[:limit]

    def begin_window(self, promotion: Promotion) -> None:
        """Remember a promotion as long as it may be taken back by itself; of each adapter the last one."""
        before = promotion.instead_of.version if promotion.instead_of else None
        self._db.execute(
            "INSERT OR REPLACE INTO promotions VALUES (?, ?, ?, ?, ?)",
            (promotion.ref.name, promotion.ref.version, before, promotion.at, promotion.before.model_dump_json()),
        )

    def end_window(self, ref: AdapterRef) -> None:
        """A promotion stands, or has been taken back: it is not compared any more."""
        self._db.execute("DELETE FROM promotions WHERE adapter = ? AND version = ?", (ref.name, ref.version))

    def windows(self) -> list[Promotion]:
        """Promotions that are still compared."""
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

    def _versions(self, clause: str, *values: object) -> list[Version]:
        rows = self._db.execute(f"SELECT manifest, state, report FROM versions {clause}", values)  # noqa: S608
        return [
            Version(
                AdapterManifest.model_validate_json(manifest),
                Lifecycle(state),
                ShadowReport.model_validate_json(report),
            )
            for manifest, state, report in rows.fetchall()
        ]

    def _move(self, version: Version, state: Lifecycle, report: ShadowReport) -> None:
        self._db.execute(
            "UPDATE versions SET state = ?, report = ?, changed = ? WHERE adapter = ? AND version = ?",
            (state, report.model_dump_json(), time.time(), version.ref.name, version.ref.version),
        )
        self._note(version.ref, state)

    def _point(self, adapter: str, alias: str, ref: AdapterRef) -> None:
        self._db.execute("INSERT OR REPLACE INTO aliases VALUES (?, ?, ?)", (adapter, alias, ref.version))

    def _note(self, ref: AdapterRef, event: str) -> None:
        self._db.execute("INSERT INTO history VALUES (?, ?, ?, ?)", (time.time(), ref.name, event, ref.version))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")


def _damaged(path: Path, what: str) -> JournalError:
    return JournalError(
        f"{path}: damaged ({what}); without it the site does not know what it served. Restore {path.parent} from a "
        f"backup; or start over: move {path.name}*, adapters/ and rounds/ out of {path.parent} and start again. The "
        "base then answers until a run of the centre pushes a version; no version is lost, the registry has them all "
        "(`umbel adapter ls`). personal/ can stay"
    )
