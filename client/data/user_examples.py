"""`ExampleStore`: examples from users who agreed: scrubbed, in quarantine, released by the operator, trained on.

    offered ──scrub──► quarantine ──`umbel examples release`──► released ──next round──► training data of its adapter
                          │ retention_days, or `umbel examples forget`: deleted, wherever it is

An example trains the adapter that its user asked for, and no other.
Only the site's user can read `examples.sqlite3` and the JSONL that preparation reads. SQLite overwrites deleted rows.
"""

import asyncio
import json
import logging
import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Self

from client.data.scrub import Scrubber, key_of, pseudonym
from client.database import connect, migrate
from client.disk import require_room
from serving.user_example import SETTINGS, ConsentSettings, Example
from umbel.errors import ConfigError, Conflict, NoRoom, NotFound
from umbel.peft_dir import replace_durably
from umbel.site.config import SiteConfig
from umbel.site.sections import ExamplesSection
from umbel.transaction import transaction

DATABASE, RELEASED = "examples.sqlite3", "examples"
"""Names of the file in the state directory, and of the folder of the released examples, a file for each adapter."""
RELEASED_OF_ALL = "examples.jsonl"
"""Name of the file in the state directory that an older umbel wrote the released examples of all adapters to."""
RETENTION_CHECK_S = 3600.0
SHAPES = (
    """
CREATE TABLE IF NOT EXISTS examples (
    id INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, user TEXT NOT NULL, version TEXT NOT NULL,
    kind TEXT NOT NULL, messages TEXT NOT NULL, released INTEGER NOT NULL DEFAULT 0);
ALTER TABLE examples ADD COLUMN adapter TEXT NOT NULL DEFAULT '';
UPDATE examples SET adapter = substr(version, 1, instr(version, '@v') - 1);
""",
    "ALTER TABLE examples ADD COLUMN rejected TEXT NOT NULL DEFAULT ''",
)
"""The tables of each release that changed them, as scripts for `migrate`; before, adapters were not told apart."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Released:
    """The examples of an adapter that may be trained on."""

    file: Path | None = None
    """JSONL for the preparation; None without any."""
    numbers: frozenset[int] = frozenset()
    """Their numbers. What a number stands for never changes, and none is given twice."""


@dataclass(frozen=True)
class Kept:
    """An example without its user's pseudonym."""

    id: int
    at: float
    """Unix time at which it was accepted."""
    adapter: str
    """The adapter that it was given to, the only one that it trains."""
    version: str
    """The version that answered; `base` before the adapter had one."""
    kind: str
    state: str
    """quarantine, waiting (for its release), or released."""
    messages: list[dict[str, str]]
    rejected: str
    """An answer to the same prompt that its user finds worse; empty without one."""


class ExampleStore:
    """The examples of one site. Examples over their retention are deleted whenever the store is used.

    >>> with closing(ExampleStore.of(config)) as store:
    ...     released = store.release()
    """

    def __init__(self, state_dir: Path, section: ExamplesSection, clock: Callable[[], float] = time.time) -> None:
        self._section = section
        self._clock = clock
        self._state_dir = state_dir
        file = state_dir / DATABASE
        os.close(os.open(file, os.O_CREAT | os.O_RDWR, 0o600))
        self._db = connect(file, timeout=30.0)
        self._db.execute("PRAGMA secure_delete = ON")
        migrate(self._db, SHAPES, partial(_newer, file))
        self.purge()

    @classmethod
    def of(cls, config: SiteConfig) -> Self:
        """Open the store of a site; it is made if it is not there. Close it after use."""
        return cls(config.site.state_dir, config.examples)

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    def add(self, example: Example, scrub: Scrubber) -> int:
        """Keep an example, scrubbed, and return its number.

        Raises Conflict when its user has `per_user` examples of this adapter or those of all together take `max_mb`,
        and NoRoom when the disk is nearly full.
        """
        scrubbed = [{"role": one["role"], "content": scrub(one["content"])} for one in example.messages]
        messages = json.dumps(scrubbed, ensure_ascii=False)
        rejected = scrub(example.rejected) if example.rejected else ""
        rejected = "" if rejected == scrubbed[-1]["content"] else rejected
        needed = len((messages + rejected).encode())
        require_room(self._state_dir, needed, "example")
        self.purge()
        with transaction(self._db):
            count = "SELECT count(*) FROM examples WHERE user = ? AND adapter = ?"
            had = self._db.execute(count, (example.user, example.adapter)).fetchone()[0]
            if had >= self._section.per_user:
                raise Conflict(
                    f"{had} examples of this user are kept already; [examples].per_user is {self._section.per_user}"
                )
            if self.used_bytes + needed > self._section.max_mb << 20:
                raise Conflict(
                    f"the examples that are kept take {self.used_bytes / (1 << 20):.1f} MB; [examples].max_mb is "
                    f"{self._section.max_mb}, and room comes back as examples are over their retention or forgotten"
                )
            added = self._db.execute(
                "INSERT INTO examples (at, user, adapter, version, kind, messages, rejected)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (self._clock(), example.user, example.adapter, example.version, example.kind, messages, rejected),
            )
        return int(added.lastrowid or 0)

    @property
    def used_bytes(self) -> int:
        """Bytes of the database that hold something; what was deleted is used again first."""
        pages, unused, size = (
            self._db.execute(f"PRAGMA {what}").fetchone()[0] for what in ("page_count", "freelist_count", "page_size")
        )
        return int((pages - unused) * size)

    def all(self, adapter: str | None = None) -> list[Kept]:
        """Return every example, or those of one adapter, oldest first."""
        columns = "id, at, adapter, version, kind, released, messages, rejected"
        rows = self._db.execute(f"SELECT {columns} FROM examples ORDER BY id")  # noqa: S608
        return [
            Kept(number, at, of, version, kind, self._state(at, bool(released)), json.loads(messages), rejected)
            for number, at, of, version, kind, released, messages, rejected in rows
            if adapter in (None, of)
        ]

    def rows(self, texts: bool, adapter: str | None = None) -> list[dict[str, object]]:
        """Return the examples as JSON values, with their texts only where `texts` is true."""
        return [
            {key: value for key, value in asdict(kept).items() if texts or key not in ("messages", "rejected")}
            | {"pair": bool(kept.rejected)}
            for kept in self.all(adapter)
        ]

    def release(self, numbers: list[int] | None = None, adapter: str | None = None) -> list[int]:
        """Release waiting examples for training (None: all of them, or of `adapter`) and return their numbers.

        Raises NotFound for a number that is not there, or not the adapter's, Conflict for an example in quarantine.
        """
        self.purge()
        known = {kept.id: kept for kept in self.all(adapter)}
        for number in numbers or ():
            if number not in known:
                of = "" if adapter is None else f" of {adapter}"
                raise NotFound(f"there is no example {number}{of}; `umbel examples ls` names them")
            if known[number].state == "quarantine":
                raise Conflict(
                    f"example {number} is in quarantine for {self._section.quarantine_hours:g} hours after it was given"
                )
        waiting = [
            kept.id for kept in known.values() if kept.state == "waiting" and (not numbers or kept.id in numbers)
        ]
        self._db.executemany("UPDATE examples SET released = 1 WHERE id = ?", [(number,) for number in waiting])
        return waiting

    def forget(self, user: str, adapter: str | None = None) -> int:
        """Delete all examples of the user with that name in requests, or those of one adapter; return their number."""
        delete, whose = "DELETE FROM examples WHERE user = ?", [pseudonym(self._state_dir, user)]
        if adapter is not None:
            delete, whose = f"{delete} AND adapter = ?", [*whose, adapter]
        gone = self._db.execute(delete, whose).rowcount
        with suppress(NoRoom):  # for a copy; what was deleted is overwritten already
            self._db.execute("VACUUM")
        return int(gone)

    def purge(self) -> int:
        """Delete the examples that are older than `retention_days`, and return their number."""
        oldest = self._clock() - 86400 * self._section.retention_days
        return int(self._db.execute("DELETE FROM examples WHERE at < ?", (oldest,)).rowcount)

    def released(self, adapter: str) -> frozenset[int]:
        """Return the numbers of an adapter's released examples; quick, as it reads no text."""
        self.purge()
        rows = self._db.execute("SELECT id, at, released FROM examples WHERE adapter = ?", (adapter,))
        return frozenset(number for number, at, released in rows if self._state(at, bool(released)) == "released")

    def export(self, adapter: str) -> Released:
        """Write an adapter's released examples as JSONL for the preparation; leave a file alone that has them."""
        self.purge()
        into = self._state_dir / RELEASED / f"{adapter}.jsonl"
        released = [kept for kept in self.all(adapter) if kept.state == "released"]
        if not released:
            into.unlink(missing_ok=True)
            return Released()
        content = "".join(_line(kept) for kept in released).encode()
        if not into.is_file() or into.read_bytes() != content:
            into.parent.mkdir(mode=0o700, exist_ok=True)
            replace_durably(into, content)
            into.chmod(0o600)
        return Released(into, frozenset(kept.id for kept in released))

    def _state(self, at: float, released: bool) -> str:
        if self._clock() < at + 3600 * self._section.quarantine_hours:
            return "quarantine"
        return "released" if released or self._section.auto_release else "waiting"


def _line(kept: Kept) -> str:
    *prompt, answer = kept.messages
    pair = {"messages": prompt, "chosen": answer, "rejected": kept.rejected}
    return json.dumps(pair if kept.rejected else {"messages": kept.messages}, ensure_ascii=False) + "\n"


def prepare(config: SiteConfig) -> None:
    """Write the settings that let the engine's HTTP process remember answers, and remove what was written to train on.

    To be called before the engine starts. Where `[examples]` is off, no answer is remembered, and examples that were
    kept before are not trained on, nor are those of adapters that the site has no more.
    """
    settings, state_dir = config.site.state_dir / SETTINGS, config.site.state_dir
    for file in (settings, state_dir / RELEASED_OF_ALL, *(state_dir / RELEASED).glob("*.jsonl")):
        file.unlink(missing_ok=True)
    if not config.examples.enabled:
        return
    models = {model: name for name in config.adapters for model in (name, f"{config.model.served_name}:{name}")}
    told = ConsentSettings(key=key_of(state_dir).hex(), socket=config.operator_socket, models=models)
    replace_durably(settings, told.model_dump_json().encode())
    settings.chmod(0o600)
    _purge(config)


def export(config: SiteConfig, adapter: str) -> Released:
    """Call `ExampleStore.export` from any thread. Where `[examples]` is off, nothing is released."""
    if not config.examples.enabled:
        return Released()
    with closing(ExampleStore.of(config)) as store:
        return store.export(adapter)


def _newer(file: Path, found: int) -> ConfigError:
    return ConfigError(
        f"{file}: its tables have version {found}, and this umbel knows {len(SHAPES)}; install the newer umbel that "
        "wrote them"
    )


def keep(config: SiteConfig, example: Example, scrub: Scrubber) -> int:
    """Call `ExampleStore.add` from any thread, with a connection of its own.

    Raises NotFound as well for an example of an adapter that is not trained here.
    """
    config.section(example.adapter)
    with closing(ExampleStore.of(config)) as store:
        return store.add(example, scrub)


async def keep_retention(config: SiteConfig) -> None:
    """Delete examples over their retention every hour, for ever, even if nobody uses the store."""
    while True:
        try:
            await asyncio.to_thread(_purge, config)
        except (NoRoom, sqlite3.Error):  # users must still be answered, and there will be another try
            logger.exception("%s: what is over its retention could not be deleted", config.site.state_dir / DATABASE)
        await asyncio.sleep(RETENTION_CHECK_S)


def _purge(config: SiteConfig) -> None:
    ExampleStore.of(config).close()  # made where it is not there; opening it purges
