"""`EngineState`: what the engine's processes write in place, so that the daemon can read it of a dead or hung engine.

Two counters say that the engine works, and two tables say which requests it is answering and has answered, by digests
of 16 bytes (`serving.suspects`). Every process of the engine maps the file; nobody locks or waits. One process writes
each part: the scheduler its counter, the HTTP process the rest. A value that is read while it is written may be torn,
and is then only another one than before.
"""

import mmap
import struct
from pathlib import Path

from umbel.peft_dir import replace_durably

FILE = "engine.state"
"""Name of the file in the run directory."""
DIGEST_BYTES = 16
IN_FLIGHT = 1024
"""Requests that are noted at a time; what comes beyond is answered without a note."""
ANSWERED = 32768
"""Latest answered requests that are remembered."""
PASSED = 2
"""Batches begun after a client left its request until the request is taken for gone: a scheduler that hangs in one
begins none after it."""
_BATCHES, _OUTPUTS, _NEXT = 0, 8, 16
_COUNTER = struct.Struct("<Q")
_TABLE = 24
_RING = _TABLE + IN_FLIGHT * DIGEST_BYTES
_END = _RING + ANSWERED * DIGEST_BYTES
_EMPTY = bytes(DIGEST_BYTES)


class EngineState:
    """The mapped file. The daemon creates it once and reads it; the engine's processes open and write it.

    >>> EngineState.create(run_dir / FILE)
    >>> state = EngineState(run_dir / FILE)
    >>> slot = state.begin(digest)
    >>> state.in_flight() == [digest]
    True
    >>> state.end(slot, answered=True)
    """

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _END)
        self._free = [slot for slot in reversed(range(IN_FLIGHT)) if not self._at(_TABLE, slot)]
        self._answered = self.answered()
        self._left: list[tuple[int, int]] = []
        """Slots of requests that their clients left, each with the batches that were begun by then."""

    @classmethod
    def create(cls, path: Path) -> "EngineState":
        """Write an empty file, all of it: a hole that the disk has no room for would end who writes into it."""
        replace_durably(path, bytes(_END))
        return cls(path)

    @property
    def batches(self) -> int:
        """Batches that the scheduler began to compute."""
        return self._count(_BATCHES)

    @property
    def outputs(self) -> int:
        """Outputs of the scheduler that reached the HTTP process: tokens, of one or several requests."""
        return self._count(_OUTPUTS)

    def count_batch(self) -> None:
        """Note that the scheduler begins to compute a batch."""
        self._add(_BATCHES)

    def count_output(self) -> None:
        """Note that tokens have reached the HTTP process."""
        self._add(_OUTPUTS)
        self._let_go()

    def begin(self, digest: bytes) -> int | None:
        """Note a request in flight; return its slot, None where all are taken."""
        self._let_go()
        if not self._free:
            return None
        slot = self._free.pop()
        self._write(_TABLE, slot, digest)
        return slot

    def end(self, slot: int | None, answered: bool, left: bool = False) -> None:
        """Remove a request from those in flight; remember it if it was answered to its end.

        One that its client `left` before is in flight until the scheduler has got past it: it may hang in it.
        """
        if slot is None:
            return
        if left:
            self._left.append((slot, self.batches))
            return
        digest = self._at(_TABLE, slot)
        self._release(slot)
        if answered and digest and digest not in self._answered:
            place = self._count(_NEXT) % ANSWERED
            self._answered.discard(self._at(_RING, place))
            self._answered.add(digest)
            self._write(_RING, place, digest)
            self._add(_NEXT)

    def in_flight(self) -> list[bytes]:
        """Return the digests of the requests in flight; one that came twice is there twice."""
        return [digest for digest in _digests(self._map[_TABLE:_RING]) if digest != _EMPTY]

    def answered(self) -> set[bytes]:
        """Return the digests of the latest requests that were answered to their end."""
        return set(_digests(self._map[_RING:_END])) - {_EMPTY}

    def clear_in_flight(self) -> None:
        """Forget the requests in flight; call it only while no engine runs."""
        self._map[_TABLE:_RING] = bytes(_RING - _TABLE)

    def _let_go(self) -> None:
        """Remove the requests that their clients left, and that the scheduler has got past."""
        if not self._left:
            return
        batches = self.batches
        for slot, _ in (gone := [one for one in self._left if batches >= one[1] + PASSED]):
            self._release(slot)
        self._left = [one for one in self._left if one not in gone]

    def _release(self, slot: int) -> None:
        self._write(_TABLE, slot, _EMPTY)
        self._free.append(slot)

    def _at(self, table: int, place: int) -> bytes:
        """Return the digest at a place of a table; no bytes for an empty one."""
        start = table + place * DIGEST_BYTES
        found = self._map[start : start + DIGEST_BYTES]
        return b"" if found == _EMPTY else found

    def _write(self, table: int, place: int, digest: bytes) -> None:
        start = table + place * DIGEST_BYTES
        self._map[start : start + DIGEST_BYTES] = digest

    def _count(self, at: int) -> int:
        return int(_COUNTER.unpack_from(self._map, at)[0])

    def _add(self, at: int) -> None:
        _COUNTER.pack_into(self._map, at, (self._count(at) + 1) % 2**64)


def _digests(table: bytes) -> list[bytes]:
    return [table[start : start + DIGEST_BYTES] for start in range(0, len(table), DIGEST_BYTES)]


def opened(run_dir: Path) -> EngineState | None:
    """Return the state in a run directory; None where no daemon made one, as in benchmarks."""
    file = run_dir / FILE
    return EngineState(file) if file.is_file() else None
