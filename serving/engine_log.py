"""`keep_bounded`: keep the newest part of SGLang's log. Users' requests make it grow, on the disk of the journal."""

import asyncio
import logging
import os
import shutil
from pathlib import Path

FILE = "engine.log"
"""Name of the log in the state directory."""
MAX_BYTES = 64 << 20
"""Size beyond which the log is moved to `engine.log.1`, in the place of the one before."""
LOOK_S = 10.0
"""Seconds between two looks at its size."""
TAIL_BYTES, TAIL_LINES = 64 << 10, 15
"""The last part of the log that an error quotes."""

logger = logging.getLogger(__name__)


def bound(log: Path, most: int = MAX_BYTES) -> None:
    """Move the last `most` bytes of a longer log to NAME.1, and empty it.

    The engine goes on writing, at the beginning, since it appends; what it writes during the copy is lost. So is the
    old part where there is no room for a copy.
    """
    if not log.is_file() or log.stat().st_size <= most:
        return
    previous, copy = log.with_name(f"{log.name}.1"), log.with_name(f".{log.name}.tmp")
    try:
        with log.open("rb") as old, copy.open("wb") as new:
            old.seek(-most, os.SEEK_END)
            shutil.copyfileobj(old, new)
        copy.replace(previous)
    except OSError as error:
        copy.unlink(missing_ok=True)
        logger.warning("engine.log_lost %s could not be copied: %s", log, error)
    os.truncate(log, 0)


async def keep_bounded(log: Path) -> None:
    """Call `bound` every few seconds, for ever."""
    while True:
        try:
            await asyncio.to_thread(bound, log)
        except OSError as error:  # users must still be answered, and there will be another try
            logger.warning("engine.log_unbounded %s: %s", log, error)
        await asyncio.sleep(LOOK_S)


def tail(log: Path) -> str:
    """Return the last lines of the log."""
    with log.open("rb") as opened:
        opened.seek(max(0, log.stat().st_size - TAIL_BYTES))
        return "\n".join(opened.read().decode(errors="replace").splitlines()[-TAIL_LINES:])
