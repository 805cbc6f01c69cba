"""Where an adapter's aliases point, and every move there ever was: one line per move, each sealed on the one before.

<root>/<name>/aliases.jsonl   {"at": …, "to": {"head": 3, "live": 3}, "who": …, "why": …, "run_id": …, "seal": sha256}
"""

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from umbel.errors import RegistryError

HEAD, LIVE, SHADOW, PREVIOUS = "head", "live", "shadow", "previous"
"""What training continues from; what the federation last let answer users; what it judges; what was live before.

The log holds moves of the first two and of aliases of the operator's own; the others follow from rounds and moves.
"""
_SEALED = re.compile(rb'"seal":"[0-9a-f]{64}"}')


class Move(BaseModel):
    """Aliases that moved together."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    at: str
    """ISO 8601, UTC."""
    to: dict[str, int | None] = Field(min_length=1)
    """Alias → version; None where it was removed."""
    who: str = ""
    why: str = ""
    run_id: str = ""
    """Flower's run, for a move that a round made."""
    seal: str = ""
    """sha256 over the seal of the line before and this line without its own."""

    def sealed(self, before: str) -> "Move":
        """The move as the line that follows the one with the seal `before`."""
        bare = self.model_copy(update={"seal": ""})
        seal = hashlib.sha256((before + bare.model_dump_json()).encode()).hexdigest()
        return bare.model_copy(update={"seal": seal})


class AliasLog:
    """The moves of one adapter's aliases, oldest first. Appending needs the registry's lock, reading does not."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def moves(self) -> list[Move]:
        """Every move; raise RegistryError, naming the line, when one was changed or lost."""
        found: list[Move] = []
        for number, line in enumerate(self._lines(), start=1):
            before = found[-1].seal if found else ""
            try:
                move = Move.model_validate_json(line)
            except ValidationError:
                move = None
            if move is None or move != move.sealed(before):
                raise RegistryError(
                    f"{self.path}, line {number}: not what was written there, or a line before it is gone; restore "
                    "the file from your backup"
                )
            found.append(move)
        return found

    def aliases(self) -> dict[str, int]:
        """Alias → version, after all moves."""
        where: dict[str, int | None] = {}
        for move in self.moves():
            where.update(move.to)
        return {alias: version for alias, version in where.items() if version is not None}

    def previous(self) -> int | None:
        """What `live` pointed to before it came to where it is; None before its second version."""
        lived = [version for move in self.moves() if (version := move.to.get(LIVE)) is not None]
        return next((version for version in reversed(lived) if version != lived[-1]), None)

    def overruling(self, expected: Mapping[str, int], ours: int | None) -> str:
        """Who moved an alias from its `expected` version, but to `ours`, and why; empty when nobody did."""
        where = self.aliases()
        moved = [alias for alias, version in expected.items() if where.get(alias) not in (version, ours)]
        if not moved:
            return ""
        last = next(move for move in reversed(self.moves()) if moved[0] in move.to)
        to = ", ".join(f"{alias} from v{expected[alias]} to v{where[alias]}" for alias in moved)
        return f"{last.who or 'an operator'} moved {to} meanwhile: {last.why or 'no reason given'}"

    def append(self, move: Move) -> None:
        """Add a move, on disk when this returns. What a killed writer left of a line is cut off first."""
        moves = self.moves()
        line = move.sealed(moves[-1].seal if moves else "").model_dump_json().encode() + b"\n"
        kept = b"".join(one + b"\n" for one in self._lines())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            size = file.tell()
            file.truncate(min(size, len(kept)))
            file.write(kept[size:] + line)
            file.flush()
            os.fsync(file.fileno())

    def _lines(self) -> list[bytes]:
        """The lines that were written whole: all, but a last one that a kill cut short before its seal."""
        *lines, last = self.path.read_bytes().split(b"\n") if self.path.is_file() else [b""]
        return [*lines, last] if _SEALED.search(last) else lines
