"""The events of a registry, one line each: for people through logging, for programs in `<registry>/events.jsonl`.

`Events` writes the file, `EventReader` reads it, `EventTail` keeps the figures that are scraped.
"""

import fcntl
import json
import logging
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from umbel.telemetry import LinePerRecord

EVENTS = "events.jsonl"
"""Name of the file, in the registry's directory."""

log = logging.getLogger("umbel")
_WORD = re.compile(r"[!#-~]+")
"""A value that stands in the log as it is: one word, without quotation marks."""


class Events:
    """Appends events, those of several runs at once to one file.

    Each is `{"event": "round.trained", "at": unix seconds, "adapter": "support", **fields}`.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock

    def emit(self, event: str, **fields: object) -> None:
        """Log and append one event. Fields are JSON values; None fields are dropped."""
        kept = {name: value for name, value in fields.items() if value is not None}
        log.info("%s %s", event, " ".join(f"{name}={_plain(value)}" for name, value in kept.items()))
        line = json.dumps({"event": event, "at": round(self._clock(), 3), **kept})
        with self._path.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # runs of other adapters append to it, too
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read() == b"\n" else f"\n{line}"  # a kill or a full disk cut the last one short
            file.write(f"{line}\n".encode())


def show_log() -> None:
    """Let umbel's log lines reach the ServerApp's output, which Flower keeps for `flwr log`."""
    if not log.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(LinePerRecord())
        log.addHandler(handler)
    log.setLevel(logging.INFO)


def _plain(value: object) -> str:
    return value if isinstance(value, str) and _WORD.fullmatch(value) else json.dumps(value)


ENDS = {"round.promoted", "round.rejected", "round.failed", "round.idle"}


@dataclass
class LastRound:
    """The last round of one adapter, as its events tell it."""

    number: int = 0
    ended_at: float | None = None
    """Unix time at which a round last ended."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Part of the round ("train", "transfer" …) → seconds it took in the last round that ended."""
    admitted: int = 0
    """Number of sites in the round's version; 0 after a round without one."""
    left_out: int = 0
    skipped: int = 0
    """Number of sites where nothing was worth training."""
    trained: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Site → loss summed over its tokens (nats), and the tokens."""
    probes: dict[str, dict[str, tuple[float, int]]] = field(default_factory=dict)
    """Site → role → held-out loss summed over tokens (nats), and the tokens."""
    admitted_at: dict[str, float] = field(default_factory=dict)
    """Site → Unix time at which it was last part of a version."""

    @property
    def train_loss(self) -> float | None:
        """Mean loss per token (nats)."""
        return _mean(list(self.trained.values()))

    @property
    def heldout_loss(self) -> dict[str, float]:
        """Role ("base", "live", "shadow") → mean loss per token over all sites (nats)."""
        roles = {role for probe in self.probes.values() for role in probe}
        means = {role: _mean([probe[role] for probe in self.probes.values() if role in probe]) for role in roles}
        return {role: mean for role, mean in means.items() if mean is not None}

    def take(self, event: dict[str, Any]) -> None:
        """Update the figures with the adapter's next event."""
        kind = event["event"]
        if kind == "round.started" and event["round"] != self.number:
            self.number, self.trained, self.probes, self.skipped = event["round"], {}, {}, 0
        elif kind == "site.trained":
            self.trained[event["site"]] = (float(event["loss_sum"]), event["num_loss_tokens"])
        elif kind == "round.trained":
            self.skipped = _sites(event.get("skipped", {}))
        elif kind == "round.published":
            self.admitted, self.left_out = len(event["weights"]), _sites(event.get("left_out", {}))
            self.admitted_at.update(dict.fromkeys(event["weights"], event["at"]))
        elif kind == "site.judged":
            self.probes[event["site"]] = {
                role: (float(said["loss_sum"]), said["loss_tokens"]) for role, said in event["probe"].items()
            }
        elif kind in ENDS:
            self.ended_at, self.seconds = event["at"], event.get("seconds", {})
            if kind in ("round.failed", "round.idle"):
                self.admitted, self.left_out = 0, max(0, _sites(event.get("reasons", {})) - self.skipped)


class EventReader:
    """Reads one events.jsonl and remembers its place, so that each line is returned once.

    A line that is still being written is left for the next call, and a line that a kill cut short is skipped.
    `on_new_file` is called when the file turns out to be another one than before, or is gone.

    >>> reader = EventReader(registry.root / EVENTS)
    >>> earlier = list(reader.read())  # everything so far
    >>> added = list(reader.read())  # only what was appended since
    """

    def __init__(self, path: Path, *, on_new_file: Callable[[], None] = lambda: None) -> None:
        self._path = path
        self._on_new_file = on_new_file
        self._inode = -1
        self._offset = 0
        """Bytes of the file that were read."""

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the events that were added since the last call; all of them the first time.

        The place moves with each event: who stops at one, or fails over it, goes on behind it the next time.
        """
        if not self._path.is_file():
            self._start_over()
            return
        with self._path.open("rb") as file:
            found = os.fstat(file.fileno())
            if found.st_ino != self._inode or found.st_size < self._offset:
                self._start_over()
            self._inode = found.st_ino
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):  # it is being written
                    break
                self._offset += len(line)
                yield from _event(line)

    def _start_over(self) -> None:
        self._offset = 0
        self._on_new_file()


def _event(line: bytes) -> Iterator[dict[str, Any]]:
    """Yield the event of a line; nothing for a line that a killed writer left broken, or that is no event."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return
    kinds = {"event": str, "at": int | float, "adapter": str}
    if isinstance(event, dict) and all(isinstance(event.get(key), kind) for key, kind in kinds.items()):
        yield event


class EventTail:
    """Counts the events of one events.jsonl and keeps each adapter's last round."""

    def __init__(self, path: Path) -> None:
        self.counts: Counter[str] = Counter()
        """Kind of event → how often it was read."""
        self.last: dict[str, LastRound] = {}
        """Adapter → its last round."""
        self._reader = EventReader(path, on_new_file=self._forget)

    def catch_up(self) -> None:
        """Take in the events that were added since the last call; start over where the file is another one."""
        for event in self._reader.read():
            self.counts[event["event"]] += 1
            try:
                self.last.setdefault(event["adapter"], LastRound()).take(event)
            except (KeyError, TypeError, ValueError, AttributeError) as error:  # a line that another program wrote
                log.warning("events.damaged %s at %s is no event of umbel's: %s", event["event"], event["at"], error)

    def _forget(self) -> None:
        self.counts.clear()
        self.last.clear()


def _sites(reasons: dict[str, str]) -> int:
    """Count the sites that reasons are given for; "*" is the round as a whole."""
    return len(reasons.keys() - {"*"})


def _mean(sums: list[tuple[float, int]]) -> float | None:
    tokens = sum(count for _, count in sums)
    return sum(loss for loss, _ in sums) / tokens if tokens else None
