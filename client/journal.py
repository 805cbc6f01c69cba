"""`Journal`: a site's memory in one SQLite file: its versions, which of them are live, and its rounds.

The alias table and everything else on disk is derived from it. Each change is one transaction (WAL, synchronous=FULL):
after a crash at any line the file holds the state before the change or after it.
"""

import sqlite3
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from client import heldout_looks, rollback_windows
from client.database import connect, migrate
from client.heldout_looks import HeldoutLooks
from client.imported import journal as imported_journal
from client.imported.journal import ImportedJournal
from client.rollback_windows import RollbackWindows
from client.rounds import journal as round_journal
from client.rounds.journal import RoundJournal
from umbel.adapter import AdapterManifest, AdapterRef, Lifecycle
from umbel.errors import Conflict, JournalError, NotFound
from umbel.messages import ShadowReport
from umbel.transaction import transaction

SCHEMA = """
CREATE TABLE IF NOT EXISTS versions (
    adapter TEXT NOT NULL, version INTEGER NOT NULL, digest TEXT NOT NULL, state TEXT NOT NULL,
    manifest TEXT NOT NULL, report TEXT NOT NULL, changed REAL NOT NULL, PRIMARY KEY (adapter, version));
CREATE TABLE IF NOT EXISTS aliases (
    adapter TEXT NOT NULL, alias TEXT NOT NULL, version INTEGER NOT NULL, PRIMARY KEY (adapter, alias));
CREATE TABLE IF NOT EXISTS history (at REAL NOT NULL, adapter TEXT NOT NULL, event TEXT NOT NULL, version INTEGER);
"""

SHAPES = (
    SCHEMA + round_journal.BY_KEY + rollback_windows.SCHEMA + heldout_looks.SCHEMA,
    round_journal.BY_ADAPTER_AND_KEY + imported_journal.SCHEMA,
)
"""The tables of each release that changed them, as scripts for `migrate`."""

# Events in the history of a version. The name of each state is one, too, noted when the state is entered.
ROLLED_BACK = "rolled back"  # the site went back from this version to the one before
TAKEN_BACK = "taken back: the base answers"  # the site went back from this version to the base
LIVE_AGAIN = "live again by roll-back"  # the site went back to this version
BY_ITSELF = "rolled back by itself: "  # users were served worse than before; the reason follows


@dataclass(frozen=True)
class Version:
    """One adapter version as the site knows it."""

    manifest: AdapterManifest
    report: ShadowReport

    @property
    def ref(self) -> AdapterRef:
        return self.manifest.ref

    @property
    def state(self) -> Lifecycle:
        return self.report.state


class Journal:
    """The only writer of `journal.sqlite3`. The constructor brings the file of an older release to
    its present shape, and raises JournalError for a damaged one, or one of a later release.

    Every change raises NoRoom where the disk is full, and then has changed nothing.

    One version from its arrival to a roll-back to the base:

        journal = Journal(state_dir / "journal.sqlite3")
        journal.add(manifest, report)              # a report of the state `candidate`
        journal.move(ref, probing)                 # the same version's report, in the next state
        journal.report(ref, judged, "judged: promote")
        journal.make_live(ref, "promoted")
        journal.alias("support", "live")           # → support@v1
        journal.make_base_live(ref)                # the base answers, support@v1 is `previous`
    """

    def __init__(self, path: Path) -> None:
        self._db = connect(path)
        try:
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            found = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
            migrate(self._db, SHAPES, partial(_newer, path))
            self.versions()
        except sqlite3.DatabaseError as error:
            raise _damaged(path, str(error)) from error
        except ValueError as error:
            raise _damaged(path, "the entry of a version cannot be read") from error
        if found != "ok":
            raise _damaged(path, found)
        self.windows = RollbackWindows(self._db)
        self.looks = HeldoutLooks(self._db)
        self.imported = ImportedJournal(self._db)

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    def rounds(self, adapter: str) -> RoundJournal:
        """Return the rounds of an adapter."""
        return RoundJournal(self._db, adapter)

    def known_rounds(self) -> list[tuple[str, str]]:
        """Return (adapter, key) of all rounds."""
        return round_journal.known_rounds(self._db)

    def add(self, manifest: AdapterManifest, report: ShadowReport) -> None:
        """Enter a candidate; raise Conflict when its name and number are taken by other weights."""
        known = self.find(manifest.ref)
        if known is not None:
            if known.manifest.digest != manifest.digest:
                raise Conflict(f"{manifest.ref} is already here with other weights; a version is never used twice")
            return
        with transaction(self._db):
            self._write(Version(manifest, report))
            self._note(manifest.ref, report.state)

    def find(self, ref: AdapterRef) -> Version | None:
        """Return a version, or None if it is not known."""
        rows = self._versions("WHERE adapter = ? AND version = ?", ref.name, ref.version)
        return rows[0] if rows else None

    def get(self, ref: AdapterRef) -> Version:
        """Return a known version; raise NotFound otherwise."""
        version = self.find(ref)
        if version is None:
            raise NotFound(f"{ref} is not known at this site; push it as a shadow first")
        return version

    def versions(self, *states: Lifecycle, adapter: str | None = None) -> list[Version]:
        """Return all versions, or those in one of `states` and of one `adapter`, oldest first."""
        known = self._versions("WHERE adapter = coalesce(?, adapter) ORDER BY adapter, version", adapter)
        return [version for version in known if not states or version.state in states]

    def move(self, ref: AdapterRef, report: ShadowReport) -> None:
        """Take a version to the state of `report`, and note the state in its history.

        Raises NotFound, and AdapterError where the version may not go there.
        """
        known = self.get(ref)
        known.state.to(report.state)
        with transaction(self._db):
            self._write(Version(known.manifest, report))
            self._note(ref, report.state)

    def report(self, ref: AdapterRef, report: ShadowReport, event: str = "", heldout: str = "") -> None:
        """Replace a version's report, with `event` in its history. The state may change, and is not noted.

        `heldout` is the digest of the held-out examples that the report's verdict is by: that is counted.

        Raises NotFound, and AdapterError where the version may not go to that state.
        """
        known = self.get(ref)
        if report.state is not known.state:
            known.state.to(report.state)
        with transaction(self._db):
            self._write(Version(known.manifest, report))
            if event:
                self._note(ref, event)
            if heldout and report.verdict is not None:
                self.looks.count(ref.name, heldout, promoted=report.verdict.accepted)

    def make_live(self, ref: AdapterRef, event: str, left: str = "") -> ShadowReport:
        """Promote (or roll back to) `ref`: it is live, what was live is previous; return its report. One transaction.

        `left`, such as ROLLED_BACK, is noted of what was live. Where the base answered, nothing is previous: to go
        back is to go back to the base. Raises NotFound, and AdapterError for a version that may not become live.
        """
        known, live = self.get(ref), self.alias(ref.name, "live")
        known.state.to(Lifecycle.LIVE)
        with transaction(self._db):
            if live is not None:
                self._enter(self.get(live), Lifecycle.RETIRED)
                self._point(ref.name, "previous", live)
                if left:
                    self._note(live, left)
            else:
                self._db.execute("DELETE FROM aliases WHERE adapter = ? AND alias = 'previous'", (ref.name,))
            report = self._enter(known, Lifecycle.LIVE, taken_back="")
            self._point(ref.name, "live", ref)
            self._note(ref, event)
        return report

    def forget(self, ref: AdapterRef, event: str) -> None:
        """Remove a version, as if it had never come; if it was live, the one before answers in its place, or the base.

        One transaction. The version may be pushed again. A version that this site went back from does not become live
        in this way.
        """
        live, previous = self.alias(ref.name, "live"), self.alias(ref.name, "previous")
        if previous in self.refused(ref.name, limit=-1):
            previous = None
        with transaction(self._db):
            self._db.execute("DELETE FROM versions WHERE adapter = ? AND version = ?", (ref.name, ref.version))
            self._db.execute("DELETE FROM aliases WHERE adapter = ? AND version = ?", (ref.name, ref.version))
            self._note(ref, event)
            if ref == live and previous is not None:
                self._db.execute("DELETE FROM aliases WHERE adapter = ? AND alias = 'previous'", (ref.name,))
                self._enter(self.get(previous), Lifecycle.LIVE)
                self._point(ref.name, "live", previous)

    def make_base_live(self, live: AdapterRef, event: str = TAKEN_BACK) -> None:
        """Let the base answer again; `live`, which answered, is previous. One transaction."""
        old = self.get(live)
        with transaction(self._db):
            self._enter(old, Lifecycle.RETIRED)
            self._point(live.name, "previous", live)
            self._db.execute("DELETE FROM aliases WHERE adapter = ? AND alias = 'live'", (live.name,))
            self._note(live, event)

    def alias(self, adapter: str, alias: str) -> AdapterRef | None:
        """Return the version that `live` or `previous` points to; None where none does."""
        row = self._db.execute(
            "SELECT version FROM aliases WHERE adapter = ? AND alias = ?", (adapter, alias)
        ).fetchone()
        return AdapterRef(adapter, row[0]) if row else None

    def history(self, adapter: str, limit: int = 10) -> list[tuple[float, str, int]]:
        """Return (unix time, event, version) of the last `limit` events, newest first."""
        return self._db.execute(
            "SELECT at, event, version FROM history WHERE adapter = ? ORDER BY at DESC LIMIT ?", (adapter, limit)
        ).fetchall()

    def refused(self, adapter: str, limit: int = 20) -> list[AdapterRef]:
        """Return versions that were rejected, or rolled back from and not live again since; newest first, -1: all."""
        rows = self._db.execute(
            "SELECT version, event, max(rowid) AS last FROM history WHERE adapter = ? AND event IN (?, ?, ?, ?) "
            "GROUP BY version ORDER BY last DESC",
            (adapter, Lifecycle.REJECTED, ROLLED_BACK, TAKEN_BACK, Lifecycle.LIVE),
        ).fetchall()
        refs = [AdapterRef(adapter, version) for version, event, _ in rows if event != Lifecycle.LIVE]
        return refs if limit < 0 else refs[:limit]

    def _versions(self, clause: str, *values: object) -> list[Version]:
        rows = self._db.execute(f"SELECT manifest, report FROM versions {clause}", values)  # noqa: S608
        return [
            Version(AdapterManifest.model_validate_json(manifest), ShadowReport.model_validate_json(report))
            for manifest, report in rows.fetchall()
        ]

    def _enter(self, version: Version, state: Lifecycle, **changes: object) -> ShadowReport:
        """Take a version to `state`, within a transaction; return its report. Raises AdapterError if it may not go."""
        report = version.report.model_copy(update={"state": version.state.to(state), **changes})
        self._write(Version(version.manifest, report))
        self._note(version.ref, state)
        return report

    def _write(self, version: Version) -> None:
        """Write a version's row: the column `state` repeats the report's state for readers of the file."""
        manifest, report = version.manifest, version.report
        self._db.execute(
            "INSERT OR REPLACE INTO versions VALUES (?, ?, ?, ?, ?, ?, ?)",
            (manifest.name, manifest.version, manifest.digest, report.state, manifest.model_dump_json(),
             report.model_dump_json(), time.time()),
        )  # fmt: skip

    def _point(self, adapter: str, alias: str, ref: AdapterRef) -> None:
        self._db.execute("INSERT OR REPLACE INTO aliases VALUES (?, ?, ?)", (adapter, alias, ref.version))

    def _note(self, ref: AdapterRef, event: str) -> None:
        self._db.execute("INSERT INTO history VALUES (?, ?, ?, ?)", (time.time(), ref.name, event, ref.version))


def _newer(path: Path, found: int) -> JournalError:
    return JournalError(
        f"{path}: a later release of umbel has changed it (shape {found}, and this one knows {len(SHAPES)}); start "
        f"that release, or restore {path.parent} from a backup of before"
    )


def _damaged(path: Path, what: str) -> JournalError:
    return JournalError(
        f"{path}: damaged ({what}); without it the site does not know what it served. Restore {path.parent} from a "
        f"backup; or start over: move {path.name}*, adapters/ and rounds/ out of {path.parent} and start again. The "
        "base then answers until a run of the centre pushes a version; no version is lost, the registry has them all "
        "(`umbel adapter ls`). personal/ can stay"
    )
