"""`Database`: a SQLite connection of the daemon, which says NoRoom where its disk is full, and goes on afterwards.

`migrate`: bring the tables of an older release to their present shape.
"""

import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from umbel.errors import NoRoom, UmbelError
from umbel.transaction import transaction

_DISK = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)
"""SQLite's codes for a disk that takes no more; over a quota or a limit of file sizes the second one."""


class Database(sqlite3.Connection):
    """A connection in autocommit mode. Each statement raises NoRoom where the disk is full: nothing was changed then.

    >>> database = connect(state_dir / "journal.sqlite3")
    >>> with transaction(database):
    ...     database.execute("DELETE FROM history")
    """

    path: Path

    def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
        """Execute one statement."""
        try:
            return super().execute(sql, parameters)
        except sqlite3.OperationalError as error:
            raise self._explained(error) from error

    def executescript(self, sql_script: str, /) -> sqlite3.Cursor:
        """Execute several statements."""
        try:
            return super().executescript(sql_script)
        except sqlite3.OperationalError as error:
            raise self._explained(error) from error

    def _explained(self, error: sqlite3.OperationalError) -> Exception:
        if error.sqlite_errorcode & 0xFF not in _DISK:
            return error
        said = f"cannot be written ({error}), and is as before; make room on its disk, then try again"
        return NoRoom(f"{self.path}: {said}")


def connect(path: Path, timeout: float = 5.0) -> Database:
    """Open a database, which is made if it is not there; wait `timeout` seconds for other writers."""
    database = sqlite3.connect(path, isolation_level=None, timeout=timeout, factory=Database)
    database.path = path
    return database


def migrate(database: Database, shapes: Sequence[str], newer: Callable[[int], UmbelError]) -> None:
    """Bring the tables to the last of `shapes`: SQL scripts, each of which changes what the ones before it made.

    The number of scripts that were run is the file's `user_version`; a file from before that was kept has the tables
    that the first one takes for granted. All is one transaction, so that others who open the file wait. Raises what
    `newer` makes of the number of a file that a later release has changed.
    """
    with transaction(database):
        found = int(database.execute("PRAGMA user_version").fetchone()[0])
        if found > len(shapes):
            raise newer(found)
        for script in shapes[found:]:
            for statement in filter(str.strip, script.split(";")):
                database.execute(statement)
        if found < len(shapes):
            database.execute(f"PRAGMA user_version = {len(shapes)}")
