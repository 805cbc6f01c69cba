"""The ServerApp's heap: what an adapter took goes back to the system once the adapter is gone."""

import ctypes

M_MMAP_THRESHOLD = -3
"""mallopt(3)'s: blocks from this size on are mapped, each for itself."""
LARGE = 64 << 10


def return_large_blocks() -> None:
    """Have glibc map every large block by itself; where there is no glibc, nothing changes.

    By default it raises that size to the largest block it has seen freed, and every later one may stay in its arenas:
    the process then grows with the number of adapters that have passed through it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE)
