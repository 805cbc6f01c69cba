"""The adapter registry: immutable versions on disk, and an SQLite index of names, aliases and rounds.

<root>/registry.sqlite        the index
<root>/<name>/v000012/        a PEFT directory + manifest.json, written whole, by rename, before the index names it
<root>/events.jsonl           what happened when (server/events.py)
"""

import fcntl
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from server.pin import Pin
from server.rounds import SCHEMA as ROUNDS_SCHEMA
from server.rounds import RoundLog, RoundState, now, transaction
from umbel import peft_dir
from umbel.adapter import AdapterManifest, AdapterRef, check_name
from umbel.errors import AdapterError, Conflict, NotFound, RegistryError

HEAD, LIVE = "head", "live"
"""What training continues from; what the federation last let answer users."""

INDEX = "registry.sqlite"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS pins (name TEXT PRIMARY KEY, pin TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS versions (name TEXT, version INTEGER, manifest TEXT NOT NULL, PRIMARY KEY (name, version));
CREATE TABLE IF NOT EXISTS aliases (name TEXT, alias TEXT, version INTEGER NOT NULL, PRIMARY KEY (name, alias));
CREATE TABLE IF NOT EXISTS alias_history (name TEXT, alias TEXT, version INTEGER, run_id TEXT, at TEXT);
"""


class AdapterRegistry:
    """Every version there ever was, and which of them is `head` and which is `live`.

    `create` makes a registry where there is none; without it a missing one raises RegistryError.
    """

    def __init__(self, root: Path, *, create: bool = False) -> None:
        self.root = root
        index = root / INDEX
        if not index.is_file():
            if not create:
                raise RegistryError(f"{root}: no adapter registry here; `flwr run` makes one at its `registry` setting")
            if any(root.glob("*/v[0-9]*")):
                raise RegistryError(f"{root}: adapter versions without {INDEX}; restore the index from your backup")
            root.mkdir(parents=True, exist_ok=True)
        # Transactions are begun by hand, so that a version number is taken and used by one writer.
        self._database = sqlite3.connect(index, timeout=60.0, isolation_level=None)
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = FULL")
        with transaction(self._database):
            for statement in filter(str.strip, (_SCHEMA + ROUNDS_SCHEMA).split(";")):
                self._database.execute(statement)
            self._database.execute("INSERT OR IGNORE INTO meta VALUES ('lineage', ?)", (secrets.token_hex(8),))
            self.rounds = RoundLog(self._database)
            self._take_up()

    def close(self) -> None:
        """Close the index; the registry cannot be used afterwards."""
        self._database.close()

    @property
    def lineage(self) -> str:
        """16 hex digits, made once per registry; part of every round key."""
        return str(self._one("SELECT value FROM meta WHERE key = 'lineage'")[0])

    @contextmanager
    def exclusive(
        self, wait_s: float, *, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
    ) -> Iterator[None]:
        """Hold the registry for one run; raise RegistryError if another one does for longer than `wait_s`."""
        deadline = clock() + wait_s
        with (self.root / ".lock").open("w") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if clock() >= deadline:
                        raise RegistryError(
                            f"{self.root}: another run works on this registry; wait for it, or stop it with `flwr stop`"
                        ) from error
                    sleep(0.5)
            yield

    # Reading

    def names(self) -> list[str]:
        """The adapters in this registry."""
        return [str(row[0]) for row in self._database.execute("SELECT DISTINCT name FROM versions ORDER BY name")]

    def versions(self, name: str) -> list[AdapterManifest]:
        """The manifests of an adapter's versions, in order; empty for an unknown one."""
        rows = self._database.execute("SELECT manifest FROM versions WHERE name = ? ORDER BY version", (name,))
        return [AdapterManifest.model_validate_json(row[0]) for row in rows]

    def aliases(self, name: str) -> dict[str, AdapterRef]:
        """`head` and, once a version was promoted, `live`."""
        rows = self._database.execute("SELECT alias, version FROM aliases WHERE name = ?", (name,))
        return {alias: AdapterRef(name, version) for alias, version in rows}

    def history(self, name: str, alias: str) -> list[tuple[AdapterRef, str, str]]:
        """(version, run id, ISO time) of every move of an alias, oldest first."""
        rows = self._database.execute(
            "SELECT version, run_id, at FROM alias_history WHERE name = ? AND alias = ? ORDER BY rowid", (name, alias)
        )
        return [(AdapterRef(name, version), run_id, at) for version, run_id, at in rows]

    def pin(self, name: str) -> Pin | None:
        """What is held fast about an adapter; None before the first quorum of sites."""
        row = self._database.execute("SELECT pin FROM pins WHERE name = ?", (name,)).fetchone()
        return None if row is None else Pin.model_validate_json(row[0])

    def resolve(self, text: str) -> AdapterRef:
        """`support@v3`, `support@head` or `support@live` → its version; raise NotFound if there is none."""
        name, _, alias = text.partition("@")
        aliases = self.aliases(name)
        if alias in aliases:
            return aliases[alias]
        known = [manifest.ref for manifest in self.versions(name)]
        match = next((ref for ref in known if str(ref) == text), None)
        if match is None:
            exist = [f"{name}@{alias}" for alias in aliases] + [str(ref) for ref in known[-3:]]
            raise NotFound(
                f"{text!r} is not in {self.root}; there is {', '.join(exist) or ', '.join(self.names()) or 'nothing'}"
            )
        return match

    def read(self, ref: AdapterRef) -> tuple[bytes, AdapterManifest]:
        """A version's safetensors bytes and manifest; raise NotFound, or RegistryError when it is damaged."""
        row = self._database.execute(
            "SELECT manifest FROM versions WHERE name = ? AND version = ?", (ref.name, ref.version)
        ).fetchone()
        if row is None:
            raise NotFound(f"{ref} is not in {self.root}")
        try:
            blob, manifest = peft_dir.read(self.directory(ref))
        except AdapterError as error:
            raise RegistryError(f"{error}; restore {self.directory(ref)} from your backup") from error
        if manifest != AdapterManifest.model_validate_json(row[0]):
            raise RegistryError(
                f"{self.directory(ref)}: its manifest is not the one that was published; restore it from your backup"
            )
        return blob, manifest

    def directory(self, ref: AdapterRef) -> Path:
        """Where a version lies, loadable by peft as it is."""
        return self.root / ref.name / f"v{ref.version:06d}"

    # Writing

    def begin(self, name: str, pin: Pin, seed: int) -> None:
        """Hold `pin` fast and publish v0, the untrained adapter, as `head`; no change where that was done before.

        Raises Conflict when the adapter is pinned to something else.
        """
        check_name(name)
        with transaction(self._database):
            held = self.pin(name)
            if held not in (None, pin):
                raise Conflict(f"{name} in {self.root} is pinned to another base, other layers, dtype or rank")
            self._database.execute("INSERT OR IGNORE INTO pins VALUES (?, ?)", (name, pin.model_dump_json()))
            if not self.versions(name):
                blob = peft_dir.encode(pin.initial(seed))
                self._write(name, pin, blob, {"round": 0})
            if HEAD not in self.aliases(name):
                self._point(name, HEAD, 0, "")

    def publish(self, name: str, blob: bytes, *, round: int, run_id: str, parent: str, **facts: Any) -> AdapterManifest:
        """Add the version that a round made; `facts` are more fields of the manifest. Moves no alias.

        The round keeps its version: publishing it again returns the first one.
        """
        with transaction(self._database):
            pin = self.pin(name)
            if pin is None:
                raise RegistryError(f"{name} in {self.root} was never begun; nothing can be published")
            record = self.rounds.find(name, round)
            if record is not None and record.version is not None:
                return self.versions(name)[record.version]
            manifest = self._write(name, pin, blob, {"round": round, "run_id": run_id, "parent": parent, **facts})
            self.rounds.record(
                name, round, run_id, RoundState.PUBLISHED, version=manifest.version, reasons=manifest.left_out
            )
        return manifest

    def accept(self, name: str, round: int, run_id: str, reasons: Mapping[str, str]) -> None:
        """Close a round whose version was promoted: `head` and `live` move to it, together."""
        with transaction(self._database):
            record = self.rounds.find(name, round)
            if record is None or record.version is None:
                raise NotFound(f"round {round} of {name} in {self.root} has no version to accept")
            self._point(name, HEAD, record.version, run_id)
            self._point(name, LIVE, record.version, run_id)
            self.rounds.record(name, round, run_id, RoundState.PROMOTED, reasons=reasons)

    def _write(self, name: str, pin: Pin, blob: bytes, facts: dict[str, Any]) -> AdapterManifest:
        version = self._one("SELECT coalesce(max(version), -1) + 1 FROM versions WHERE name = ?", name)[0]
        manifest = AdapterManifest(
            name=name, version=version, digest=peft_dir.digest(blob), base=pin.fingerprint.digest,
            lineage=self.lineage, rank=pin.rank, target_modules=pin.target_modules, created=now(), **facts,
        )  # fmt: skip
        peft_dir.write(self.directory(manifest.ref), blob, manifest, base=f"sha256:{manifest.base}")
        self._index(manifest)
        return manifest

    def _index(self, manifest: AdapterManifest) -> None:
        row = (manifest.name, manifest.version, manifest.model_dump_json())
        self._database.execute("INSERT INTO versions VALUES (?, ?, ?)", row)

    def _take_up(self) -> None:
        """Index versions that were written just before their publisher was killed."""
        indexed = {self.directory(known.ref) for name in self.names() for known in self.versions(name)}
        for path in sorted(set(self.root.glob("*/v[0-9]*")) - indexed):
            try:
                manifest = peft_dir.read(path)[1]
            except AdapterError as error:
                raise RegistryError(f"{error}; remove or restore {path}") from error
            if self.directory(manifest.ref) != path or manifest.lineage != self.lineage:
                raise RegistryError(f"{path}: holds {manifest.ref} of another registry; move it out of {self.root}")
            self._index(manifest)
            if manifest.round:
                self.rounds.record(
                    manifest.name, manifest.round, manifest.run_id, RoundState.PUBLISHED,
                    version=manifest.version, reasons=manifest.left_out,
                )  # fmt: skip

    def _point(self, name: str, alias: str, version: int, run_id: str) -> None:
        self._database.execute("INSERT OR REPLACE INTO aliases VALUES (?, ?, ?)", (name, alias, version))
        self._database.execute(
            "INSERT INTO alias_history VALUES (?, ?, ?, ?, ?)", (name, alias, version, run_id, now())
        )

    def _one(self, query: str, *parameters: object) -> tuple[Any, ...]:
        row: tuple[Any, ...] = self._database.execute(query, parameters).fetchone()
        return row
