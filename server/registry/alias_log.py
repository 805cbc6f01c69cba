"""`AliasLog`: every move of an adapter's aliases, one line each; `Aliases`: where they point and how they may move.

Each line is sealed on the one before, so that a change to the file is noticed.

<root>/<name>/aliases.jsonl   {"at": …, "to": {"head": 3, "live": 3}, "who": …, "why": …, "run_id": …, "seal": sha256}
"""

import hashlib
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from server.registry.round_log import RoundLog, now
from umbel.adapter import AdapterRef, check_name
from umbel.errors import AdapterError, RegistryError
from umbel.faults import Point, reach

HEAD, LIVE, SHADOW, PREVIOUS = "head", "live", "shadow", "previous"
"""`head`: training continues from it. `live`: the federation last promoted it. `shadow`: it is being judged.
`previous`: it was live before.

The log holds the moves of the first two and of the operator's own aliases; the others follow from rounds and moves.
"""
_SEALED = re.compile(rb'"seal":"[0-9a-f]{64}"}')


class Move(BaseModel):
    """One line of the log: aliases that moved together."""

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
        """Return the move with its seal, as the line that follows the one with the seal `before`."""
        bare = self.model_copy(update={"seal": ""})
        seal = hashlib.sha256((before + bare.model_dump_json()).encode()).hexdigest()
        return bare.model_copy(update={"seal": seal})


class AliasLog:
    """The moves of one adapter, oldest first. Appending needs the registry's transaction, reading does not."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def moves(self) -> list[Move]:
        """Return every move; raise RegistryError, naming the line, when one was changed or lost."""
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

    def named(self) -> set[int]:
        """Return the numbers of all versions that an alias pointed to, as far as the lines can be read."""
        found: set[int | None] = set()
        for line in self._lines():
            with suppress(ValidationError):  # a damaged line is an error for who asks for an alias
                found |= set(Move.model_validate_json(line).to.values())
        return {version for version in found if version is not None}

    def aliases(self) -> dict[str, int]:
        """Alias → version, after all moves."""
        where: dict[str, int | None] = {}
        for move in self.moves():
            where.update(move.to)
        return {alias: version for alias, version in where.items() if version is not None}

    def previous(self) -> int | None:
        """Return the version that `live` pointed to before; None before its second version."""
        lived = [version for move in self.moves() if (version := move.to.get(LIVE)) is not None]
        return next((version for version in reversed(lived) if version != lived[-1]), None)

    def overruling(self, expected: Mapping[str, int], ours: int | None) -> str:
        """Say who moved an alias from its `expected` version, other than to `ours`, and why; empty when nobody did."""
        where = self.aliases()
        moved = [alias for alias, version in expected.items() if where.get(alias) not in (version, ours)]
        if not moved:
            return ""
        last = next(move for move in reversed(self.moves()) if moved[0] in move.to)
        to = ", ".join(f"{alias} from v{expected[alias]} to v{where[alias]}" for alias in moved)
        return f"{last.who or 'an operator'} moved {to} meanwhile: {last.why or 'no reason given'}"

    def append(self, move: Move) -> None:
        """Add a move, on disk when this returns. An unfinished line of a killed writer is cut off first."""
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
        """Return the lines that were written whole: all but a last one that a kill cut short before its seal."""
        *lines, last = self.path.read_bytes().split(b"\n") if self.path.is_file() else [b""]
        return [*lines, last] if _SEALED.search(last) else lines


class Aliases:
    """The aliases of the adapter `name`. Moving them needs the registry's transaction, reading does not."""

    def __init__(self, name: str, log: AliasLog, rounds: RoundLog) -> None:
        self._name = name
        self._log = log
        self._rounds = rounds

    def stored(self) -> dict[str, AdapterRef]:
        """`head`, `live` once a version was promoted, and the operator's own."""
        return {alias: AdapterRef(self._name, version) for alias, version in self._log.aliases().items()}

    def all(self) -> dict[str, AdapterRef]:
        """The stored aliases, and those that follow: `previous`, and `shadow` while a version is being judged."""
        found = self.stored()
        previous = self.previous()
        if previous is not None:
            found[PREVIOUS] = previous
        judged = [record.version for record in self._rounds.all(self._name) if not record.state.final]
        found.update((SHADOW, AdapterRef(self._name, version)) for version in judged if version is not None)
        return found

    def previous(self) -> AdapterRef | None:
        """The version that `live` pointed to before; None before its second version."""
        version = self._log.previous()
        return None if version is None else AdapterRef(self._name, version)

    def history(self, alias: str) -> list[tuple[AdapterRef, str, str]]:
        """(version, run id, ISO time) of every move of an alias, oldest first."""
        moves = [(move, move.to.get(alias)) for move in self._log.moves()]
        return [
            (AdapterRef(self._name, version), move.run_id, move.at) for move, version in moves if version is not None
        ]

    def overruled(self, round: int) -> str:
        """Say which operator moved `head` or `live` since a round began, and why; empty when nobody did."""
        record = self._rounds.find(self._name, round)
        expected = self._rounds.expected(self._name, round)
        return self._log.overruling(expected, record.version if record else None)

    def move(self, to: Mapping[str, int | None], *, who: str, why: str, run_id: str = "") -> None:
        """Move aliases together; a move that was made before an interruption is not made again."""
        where = self._log.aliases()
        if any(where.get(alias) != version for alias, version in to.items()):
            self._log.append(Move(at=now(), to=dict(to), who=who, why=why, run_id=run_id))
            reach(Point.ALIASES_MOVED)


def check_alias(alias: str) -> None:
    """Raise RegistryError for an alias that follows by itself, AdapterError for a word that cannot be one."""
    if alias in (SHADOW, PREVIOUS):
        raise RegistryError(f"{alias} cannot be moved: it follows from the rounds and from where live was")
    if re.fullmatch(r"v\d+", alias):
        raise AdapterError(f"{alias!r} cannot be an alias: it is the name of a version")
    check_name(alias)
