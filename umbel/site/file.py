"""Read a site file as TOML with absolute paths, and explain its mistakes; `umbel.site.config` says what tables mean."""

import difflib
import os
import tomllib
import typing
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from umbel.errors import ConfigError

PATHS = {
    "site": {"state_dir", "socket", "trusted_key", "signing_key"},
    "model": {"path"},
    "engine": {"api_keys"},
    "training": {"data", "eval_data"},
    "shadow.guard": {"data"},
}
"""Dotted name of a table → those of its keys that hold a path."""


def read(path: Path) -> dict[str, Any]:
    """Return the tables of a site file. Relative paths start at the file's folder.

    Raises ConfigError for a file that cannot be read or is not TOML, and for a path with a null byte.
    """
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
    """Return the tables with a dotted name, all of an array. Values of other types are left to the validation."""
    found = [tables]
    for part in name.split("."):
        values = [table.get(part) for table in found]
        items = [item for value in values for item in (value if isinstance(value, list) else [value])]
        found = [item for item in items if isinstance(item, dict)]
    return found


PREFIX = "UMBEL_SITE__"
"""Beginning of the names of environment variables that set something in a site file."""
Setting = tuple[str, ...]
"""Path to a setting, such as ("engine", "port"), or to a whole table: ("engine",)."""


def variables() -> dict[Setting, str]:
    """Return each setting that an environment variable names, existing or not → the variable."""
    return {
        tuple(name[len(PREFIX) :].lower().split("__")): name for name in os.environ if name.upper().startswith(PREFIX)
    }


def unknown_variables(settings: Collection[Setting]) -> dict[str, str]:
    """Return each environment variable that sets none of `settings` → the mistake, with a hint."""
    known = {"__".join(setting).upper() for setting in settings}
    found: dict[str, str] = {}
    for setting, name in variables().items():
        if setting in settings or setting[:2] == ("engine", "extra_args"):
            continue
        if setting[:2] == ("engine", "env"):  # its case is lost here, so that another variable would be set
            found[name] = f'write it into [engine.env], or set {PREFIX}ENGINE__ENV to JSON such as {{"NAME": "value"}}'
            continue
        near = difflib.get_close_matches(name[len(PREFIX) :].upper(), known, n=1, cutoff=0.6)
        found[name] = "is no setting of a site; " + (f"did you mean {PREFIX}{near[0]}?" if near else "unset it")
    return found


def blamed_variable(location: Collection[int | str]) -> str | None:
    """Return the environment variable that set the value at `location`, or None if the file did."""
    where = tuple(map(str, location))
    setting = max((one for one in variables() if where[: len(one)] == one), key=len, default=None)
    return None if setting is None else variables()[setting]


def variables_of(table: str) -> list[str]:
    """Return the environment variables that set something in a table, sorted."""
    return sorted(name for setting, name in variables().items() if setting[0] == table)


Location = tuple[int | str, ...]
"""Path to a value as pydantic reports it, such as ("shadow", "guard", 0, "data")."""
LISTS: tuple[Location, ...] = (("adapter",), ("shadow", "guard"))
"""Locations of the tables that are written with double brackets."""


def explain(root: type[BaseModel], found: ValidationError, path: Path, told: Collection[str]) -> list[str]:
    """Explain each mistake in a `root` in a line that begins with the file or, where a variable set it, the variable.

    Mistakes of the variables in `told` are left out, because they were reported before.
    """
    lines = []
    for mistake in found.errors():
        if found.error_count() > 1 and mistake["type"] == "too_short":
            continue  # a tuple whose item is wrong is also "too short" to pydantic: the item's own line says it
        blamed = blamed_variable(mistake["loc"]) if mistake["type"] != "missing" else None
        if blamed is None or blamed not in told:
            lines.append(f"{blamed or path}: {_explain(root, mistake['loc'], mistake['type'], mistake['msg'])}")
    return lines


def _explain(root: type[BaseModel], location: Location, kind: str, message: str) -> str:
    where = ".".join(map(str, location))
    if kind == "extra_forbidden":
        siblings = _keys(root, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), siblings, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(siblings)}"
        return f"{where} is not a setting; {hint}"
    if kind == "missing":
        return f"{where} is missing"
    if kind == "tuple_type" and location in LISTS:
        return f"{where}: write [[{where}]], with double brackets: it is a list of tables"
    told = message.removeprefix("Value error, ")
    return f"{where}: {told}" if where else told


def settings(root: type[BaseModel]) -> set[tuple[str, ...]]:
    """Return every table of a `root`, and every setting in a table that is not a list."""
    found: set[tuple[str, ...]] = {(table,) for table in root.model_fields}
    for table, field in root.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= {(table, key) for key in field.annotation.model_fields}
    return found


def _keys(root: type[BaseModel], location: Location) -> list[str]:
    """Return the names of the settings that the table at `location` can have."""
    table = root
    for part in location:
        if isinstance(part, str):
            annotation = table.model_fields[part].annotation
            inner = next((arg for arg in typing.get_args(annotation) if arg is not Ellipsis), annotation)
            table = typing.cast(type[BaseModel], inner)
    return list(table.model_fields)
