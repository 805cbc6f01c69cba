"""How much memory is this process's own, and nobody else's."""

import ctypes
from pathlib import Path


def private_bytes() -> int:
    """Private memory of this process (Linux): what would be free again if it ended."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


def give_back() -> None:
    """Return freed heap memory to the system; glibc keeps it otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
