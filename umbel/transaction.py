"""`transaction`: run statements of SQLite together or not at all, for a site's journal and the centre's index."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from umbel.errors import NoRoom


@contextmanager
def transaction(database: sqlite3.Connection) -> Iterator[None]:
    """Run all statements of the block, or none; other writers wait."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.OperationalError, NoRoom):  # SQLite has ended it already where the disk is full
            database.execute("ROLLBACK")
        raise
