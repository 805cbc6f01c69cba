"""`DataInUse`: the token files that an adapter's rounds and probes use, and when those of before are removed.

What begins after `adopt` uses the new files; what is under way ends with those that it `held` from its beginning.
"""

import logging
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from client.data.prepare import Prepared

logger = logging.getLogger(__name__)


class DataInUse:
    """The newest token files of an adapter, and those of before that something still uses. One event loop has it.

    >>> with data.held() as prepared:
    ...     scores = await jobs.evaluate(prepared, folder)
    """

    def __init__(self, prepared: Prepared) -> None:
        self.current = prepared
        self.changes = 0
        """Times that other files were adopted."""
        self.refused = ""
        """Why the files of examples, as they are now, are not in use; empty where they are."""
        self._held: Counter[str] = Counter()
        self._left: dict[str, Prepared] = {}
        """Name of a directory → token files of before, which go when nothing holds them."""
        self.rounds_wait = False
        """True while a round waits until an example that was deleted is no longer in the data."""

    def adopt(self, prepared: Prepared) -> None:
        """Let everything that begins from now on use these files."""
        before, self.current = self.current, prepared
        self.changes += before.folder != prepared.folder
        self._left[before.folder.name] = before
        self._left.pop(prepared.folder.name, None)
        self._clear()

    def drop(self, prepared: Prepared) -> None:
        """Remove files that were prepared and are not to be used."""
        if prepared.folder != self.current.folder:
            self._left[prepared.folder.name] = prepared
            self._clear()

    @contextmanager
    def held(self) -> Iterator[Prepared]:
        """Keep the files that are current now while the block runs."""
        prepared = self.current
        with self._holding(prepared.folder.name):
            yield prepared

    @contextmanager
    def all_held(self) -> Iterator[tuple[str, ...]]:
        """Keep all files that are still there while the block runs; yield the names of their directories."""
        names = (self.current.folder.name, *self._left)
        with self._holding(*names):
            yield names

    @contextmanager
    def _holding(self, *names: str) -> Iterator[None]:
        self._held.update(names)
        try:
            yield
        finally:
            self._held.subtract(names)
            self._clear()

    def _clear(self) -> None:
        """Remove the files of before that nothing holds: a text that was taken out of the data is in them, too."""
        for name, old in list(self._left.items()):
            if self._held[name]:
                continue
            try:
                if re.fullmatch("[0-9a-f]{64}", name) and old.folder.exists():
                    shutil.rmtree(old.folder)
            except OSError as error:
                logger.error("data.left %s cannot be removed (%s); tried again later", old.folder, error.strerror)
                continue
            del self._left[name]
