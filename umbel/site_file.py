"""A site file as it lies on disk: TOML, with its relative paths made absolute. What it means is `umbel.config`'s."""

import os
import tomllib
from pathlib import Path
from typing import Any

from umbel.errors import ConfigError

PATHS = {
    "site": {"state_dir", "socket", "trusted_key", "signing_key"},
    "model": {"path"},
    "engine": {"api_keys"},
    "training": {"data", "eval_data"},
    "shadow.guard": {"data"},
}
"""Table → its keys that hold a path."""


def read(path: Path) -> dict[str, Any]:
    """The tables of a site file; raise ConfigError for what is no TOML. Relative paths start at the file's folder."""
    try:
        tables = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, UnicodeDecodeError, or nested too deep
        raise ConfigError(f"{path}: not TOML: {error}") from error
    for table, keys in PATHS.items():
        for section in _sections(tables, table):
            for key in section.keys() & keys:
                if isinstance(section[key], str):
                    section[key] = _absolute(path, f"{table}.{key}", section[key])
    return tables


def _absolute(path: Path, key: str, value: str) -> str:
    if "\0" in value:
        raise ConfigError(f"{path}: {key} holds a null byte; no file is called so")
    return str(path.parent.resolve() / os.path.expanduser(value))  # leaves `~nobody` as it is


def _sections(tables: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The tables of a dotted name, every one of an array; what is no table is left to the validation."""
    found = [tables]
    for part in name.split("."):
        values = [table.get(part) for table in found]
        items = [item for value in values for item in (value if isinstance(value, list) else [value])]
        found = [item for item in items if isinstance(item, dict)]
    return found
