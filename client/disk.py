"""`require_room`: refuse what others send before it fills the disk that the journal needs.

The journal's own writes are a few kilobytes, and are never refused: without them nothing is promoted or rolled back.
"""

import os
from pathlib import Path

from umbel.errors import NoRoom

RESERVE_BYTES = 256 << 20
RESERVE_SHARE = 0.02
"""The reserve is the smaller of RESERVE_BYTES and this share of the disk."""


def require_room(state_dir: Path, needed: int, what: str) -> None:
    """Raise NoRoom where `needed` bytes more, for `what`, would leave less than the reserve on the disk."""
    disk = os.statvfs(state_dir)
    free = disk.f_bavail * disk.f_frsize
    reserve = min(RESERVE_BYTES, int(RESERVE_SHARE * disk.f_blocks * disk.f_frsize))
    if free - needed < reserve:
        raise NoRoom(
            f"{what}: not kept; {state_dir} is on a disk with {_mb(free)} free, {_mb(needed)} are needed, and "
            f"{_mb(reserve)} stay in reserve for the journal; make room there"
        )


def _mb(number: int) -> str:
    return f"{number / (1 << 20):,.1f} MB"
