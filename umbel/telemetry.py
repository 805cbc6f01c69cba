"""`configure_logging`: the same log in every process of umbel: one event per line, `event key=value …`, or JSON."""

import json
import logging
import os
import sys


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
    """Log to standard error; UMBEL_LOG=json for machines, UMBEL_LOG_LEVEL for another level than INFO."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    handler.setFormatter(_Json() if os.environ.get("UMBEL_LOG") == "json" else text)
    logging.basicConfig(level=os.environ.get("UMBEL_LOG_LEVEL", "INFO"), handlers=[handler], force=True)
    for noisy in ("httpx", "httpcore", "asyncio", "uvicorn"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
