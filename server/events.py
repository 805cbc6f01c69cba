"""What happened, one line per event: for people through logging, for programs in `<registry>/events.jsonl`."""

import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger("umbel")


class Events:
    """Appends events; each is `{"event": "round.trained", "at": unix seconds, **fields}`."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock

    def emit(self, event: str, **fields: object) -> None:
        """Log and append one event. Fields are JSON values; None fields are dropped."""
        kept = {name: value for name, value in fields.items() if value is not None}
        log.info("%s %s", event, " ".join(f"{name}={_plain(value)}" for name, value in kept.items()))
        line = json.dumps({"event": event, "at": round(self._clock(), 3), **kept})
        with self._path.open("a") as file:
            file.write(line + "\n")


def show_log() -> None:
    """Let umbel's log lines reach the ServerApp's output, which Flower keeps for `flwr log`."""
    if not log.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(handler)
    log.setLevel(logging.INFO)


def _plain(value: object) -> str:
    return value if isinstance(value, str) and " " not in value else json.dumps(value)
