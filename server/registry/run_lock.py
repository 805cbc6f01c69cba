"""The lock that lets one run at a time work on an adapter; runs of other adapters go on beside it."""

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from umbel.adapter import check_name
from umbel.errors import RegistryError

RUNS = ".runs"
"""Folder in the registry's directory; it has a folder for each adapter: the lock of its run, and what that spools."""
POLL_S = 0.5
"""Seconds between two tries."""


def folder(root: Path, name: str) -> Path:
    """Return the folder of an adapter's run; it is there while `exclusive` holds it, and stays afterwards."""
    return root / RUNS / check_name(name)


@contextmanager
def exclusive(
    root: Path,
    name: str,
    wait_s: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[None]:
    """Hold an adapter for one run; raise RegistryError if another run holds it for longer than `wait_s` seconds.

    The lock is not in the adapter's own folder, which is there from `AdapterRegistry.begin` on.
    """
    deadline = clock() + wait_s
    place = folder(root, name)
    place.mkdir(parents=True, exist_ok=True)
    with (place / "lock").open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if clock() >= deadline:
                    raise RegistryError(
                        f"{root}: another run works on {name}; wait for it, or stop it with `flwr stop`, or with "
                        "Ctrl-C where `umbel adapt` is the run"
                    ) from error
                sleep(POLL_S)
        yield


def under_way(root: Path, name: str) -> bool:
    """Return whether a run works on an adapter now; any number of callers may look at the same time."""
    try:
        with (folder(root, name) / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
