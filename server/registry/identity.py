"""What a registry is: its id, and where its weights lie. Written once, as `<root>/registry.json`.

Releases before that file kept id, pins and aliases only in the index; `establish` writes the files from it.
"""

import json
import re
import secrets
import sqlite3
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from server.registry import version_dir
from server.registry.alias_log import AliasLog, Move
from umbel import peft_dir
from umbel.adapter import AdapterManifest
from umbel.errors import RegistryError

Model = TypeVar("Model", bound=BaseModel)
IDENTITY, PIN, ALIASES = "registry.json", "pin.json", "aliases.jsonl"


class Identity(BaseModel):
    """One registry."""

    lineage: str
    """16 hex digits, part of every round key."""
    blobs: str = ""
    """fsspec URL of the weights; empty for `blobs/` in the registry's directory."""


def require_local(root: Path) -> None:
    """Raise RegistryError for a URL, which as a path would be a directory called `s3:` right here."""
    if re.fullmatch(r"[a-z][a-z0-9+.-]+:", next(iter(root.parts), "")):
        raise RegistryError(
            f"{root}: a registry is a directory on this machine; its weights may lie elsewhere: "
            "`umbel registry init --registry DIR --blobs s3://bucket/prefix`"
        )


def read(model: type[Model], path: Path) -> Model:
    """One of a registry's JSON files; raise RegistryError when it is missing or damaged."""
    try:
        return model.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise RegistryError(f"{path}: cannot be read, or was changed; restore it from your backup") from error


def establish(root: Path, database: sqlite3.Connection, blobs: str) -> None:
    """Write `registry.json` where there is none: for a new registry, an older one, or one that lost the file."""
    if (root / IDENTITY).is_file():
        return
    tables = {row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if "meta" in tables:
        lineage = str(database.execute("SELECT value FROM meta WHERE key = 'lineage'").fetchone()[0])
        _write_out(root, database)
        for table in ("meta", "pins", "aliases", "alias_history"):
            database.execute(f"DROP TABLE {table}")
        database.execute("PRAGMA user_version = 0")  # the versions are listed anew, in today's table
    else:
        versions = version_dir.every(root)
        if versions and not blobs and not any((path / peft_dir.WEIGHTS).exists() for path in versions):
            raise RegistryError(
                f"{root / IDENTITY} is gone, and the weights are not here; restore it, or say where they lie: "
                f"`umbel registry init --registry {root} --blobs URL`"
            )
        lineage = _lineage_of_versions(root) or secrets.token_hex(8)
    peft_dir.replace_durably(root / IDENTITY, Identity(lineage=lineage, blobs=blobs).model_dump_json().encode())


def _lineage_of_versions(root: Path) -> str | None:
    """What most versions say of the registry that made them."""
    found: Counter[str] = Counter()
    for path in version_dir.every(root):
        with suppress(OSError, ValidationError):  # damaged ones are named when the versions are listed
            found[AdapterManifest.model_validate_json((path / peft_dir.MANIFEST).read_bytes()).lineage] += 1
    return found.most_common(1)[0][0] if found else None


def _write_out(root: Path, database: sqlite3.Connection) -> None:
    """Pins and alias moves of an older index, as files."""
    for name, pin in database.execute("SELECT name, pin FROM pins"):
        peft_dir.replace_durably(root / name / PIN, json.dumps(json.loads(pin), indent=2).encode())
    moves = database.execute("SELECT name, alias, version, run_id, at FROM alias_history ORDER BY rowid").fetchall()
    for name in {move[0] for move in moves}:
        log = AliasLog(root / name / ALIASES)
        for _, alias, version, run_id, at in [move for move in moves if move[0] == name][len(log.moves()) :]:
            log.append(Move(at=at, to={alias: version}, who="umbel", run_id=run_id))
