"""The lock that lets one run at a time work on a registry."""

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from umbel.errors import RegistryError

POLL_S = 0.5
"""Seconds between two tries."""


@contextmanager
def exclusive(
    root: Path, wait_s: float, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
) -> Iterator[None]:
    """Hold the registry at `root`; raise RegistryError if another run holds it for longer than `wait_s` seconds."""
    deadline = clock() + wait_s
    with (root / ".lock").open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if clock() >= deadline:
                    raise RegistryError(
                        f"{root}: another run works on this registry; wait for it, or stop it with `flwr stop`"
                    ) from error
                sleep(POLL_S)
        yield
