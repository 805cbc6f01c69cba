"""`Watched`: tell whether the files that an adapter's examples come from have changed, by looking at little of them."""

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from client.data.examples import half_written
from client.data.summary import files_of
from client.data.user_examples import DATABASE, ExampleStore
from umbel.site.config import SiteConfig

HALF_WRITTEN_S = 60.0
"""Seconds after which half a line at the end of a file that does not change is no longer waited for."""
STORE_S = 60.0
"""Seconds after which the examples of users are looked at although nobody changed any: a quarantine may have ended."""

Stamp = tuple[int, int, int] | None
"""Inode, size and time of change of a file, by which another content is told; None where there is no file."""


@dataclass(frozen=True)
class Inputs:
    """All that an adapter's token files are made from, as it was at one moment."""

    files: dict[Path, Stamp] = field(default_factory=dict)
    released: frozenset[int] = frozenset()
    """Numbers of the examples of users that were released."""


class Watched:
    """Looks at an adapter's files and at the examples that its users gave, from any thread.

    >>> watched = Watched(config, "support")
    >>> changed = watched.now() != before
    """

    def __init__(self, config: SiteConfig, adapter: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._adapter = adapter
        self._clock = clock
        self._files = tuple(files_of(config, adapter).values())
        self._since: dict[Path, tuple[Stamp, float]] = {}
        """File → its stamp, and since when it is known to have that one."""
        self._store: tuple[Stamp, float, frozenset[int]] = (None, clock(), frozenset())
        """Stamp of the database of examples when it was read, the time, and what was found."""

    def now(self) -> Inputs:
        """Return the inputs as they are. Raises sqlite3.Error, OSError, UmbelError where the store cannot be read."""
        files = {file: _stamp(file) for file in self._files}
        for file, stamp in files.items():
            if file not in self._since or self._since[file][0] != stamp:
                self._since[file] = stamp, self._clock()
        return Inputs(files, self._released())

    def half_written(self) -> bool:
        """Return whether a file ends with half a line that somebody may still be writing."""
        return any(
            self._clock() - since < HALF_WRITTEN_S and half_written(file)
            for file, (stamp, since) in self._since.items()
            if stamp is not None
        )

    def _released(self) -> frozenset[int]:
        if not self._config.examples.enabled:
            return frozenset()
        stamp = _stamp(self._config.site.state_dir / DATABASE)
        before, at, found = self._store
        if stamp is None or stamp != before or self._clock() - at >= STORE_S:
            at = self._clock()
            with closing(ExampleStore.of(self._config)) as store:
                found = store.released(self._adapter)
            self._store = (stamp, at, found)
        return found


def _stamp(file: Path) -> Stamp:
    try:
        found = file.stat()
    except OSError:  # missing, perhaps for a moment
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
