"""`daemon_runs`: tell whether a site's daemon runs, by the lock that it holds in its state directory."""

import fcntl
from pathlib import Path

LOCK = "lock"
"""Name of the file in state_dir that a daemon holds from its start to its end."""


def daemon_runs(state_dir: Path) -> bool:
    """Return whether a daemon runs, or starts; any number of callers may look at the same time."""
    try:
        with (state_dir / LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # no daemon has been here, or one of another user whose directory cannot be read
    return False
