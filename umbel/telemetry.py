"""`configure_logging`: the same log in every process of umbel: one event per line, `event key=value …`, or JSON."""

import json
import logging
import os
import sys
from typing import Any

from umbel.errors import ConfigError
from umbel.printable import escaped, one_line

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


class LinePerRecord(logging.Formatter):
    """Formats a record as one line in which nothing drives a terminal; a traceback follows, further in."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        return one_line(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        return "  " + escaped(super().formatException(ei)).replace("\n", "\n  ")


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "at": self.formatTime(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def configure_logging() -> None:
    """Log to standard error; UMBEL_LOG=json for machines, UMBEL_LOG_LEVEL for another level than INFO.

    Raises ConfigError, which names the variable, for another value.
    """
    form, level = os.environ.get("UMBEL_LOG") or "text", (os.environ.get("UMBEL_LOG_LEVEL") or "INFO").upper()
    if form not in ("text", "json"):
        raise ConfigError(f"UMBEL_LOG: {form!r} is no form of log; set it to text or json, or unset it")
    if level not in LEVELS:
        raise ConfigError(f"UMBEL_LOG_LEVEL: {level!r} is no level; set it to one of {', '.join(LEVELS)}, or unset it")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if form == "json" else LinePerRecord())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for noisy in ("httpx", "httpcore", "asyncio", "uvicorn"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
