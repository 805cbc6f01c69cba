"""A site file as it lies on disk: TOML, with its relative paths made absolute. What it means is `umbel.config`'s."""

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


PREFIX = "UMBEL_SITE__"
Setting = tuple[str, ...]
"""Where a setting is: ("engine", "port"); a whole table is ("engine",)."""


def variables() -> dict[Setting, str]:
    """Setting → the variable that is to set it, whether there is such a setting or not."""
    return {
        tuple(name[len(PREFIX) :].lower().split("__")): name for name in os.environ if name.upper().startswith(PREFIX)
    }


def unknown_variables(settings: Collection[Setting]) -> dict[str, str]:
    """Variable → what is wrong with it, for each that sets none of `settings`."""
    known = {"__".join(setting).upper() for setting in settings}
    found: dict[str, str] = {}
    for setting, name in variables().items():
        if setting in settings or setting[:2] == ("engine", "extra_args"):
            continue
        if setting[:2] == ("engine", "env"):  # a variable's name loses its case here, and would set another one
            found[name] = f'write it into [engine.env], or set {PREFIX}ENGINE__ENV to JSON such as {{"NAME": "value"}}'
            continue
        near = difflib.get_close_matches(name[len(PREFIX) :].upper(), known, n=1, cutoff=0.6)
        found[name] = "is no setting of a site; " + (f"did you mean {PREFIX}{near[0]}?" if near else "unset it")
    return found


def blamed_variable(location: Collection[int | str]) -> str | None:
    """The variable that set what is at `location`, if one did."""
    where = tuple(map(str, location))
    setting = max((one for one in variables() if where[: len(one)] == one), key=len, default=None)
    return None if setting is None else variables()[setting]


def variables_of(table: str) -> list[str]:
    """The variables that set something in a table."""
    return sorted(name for setting, name in variables().items() if setting[0] == table)


Location = tuple[int | str, ...]
LISTS: tuple[Location, ...] = (("adapter",), ("shadow", "guard"))
"""Where tables with double brackets stand."""


def explain(root: type[BaseModel], found: ValidationError, path: Path, told: Collection[str]) -> list[str]:
    """A line for each mistake in a `root`, which begins with the file or, where one set it, the variable.

    Of the variables in `told` everything is said already.
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
    """Every table of a `root`, and every setting in one that is no list."""
    found: set[tuple[str, ...]] = {(table,) for table in root.model_fields}
    for table, field in root.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= {(table, key) for key in field.annotation.model_fields}
    return found


def _keys(root: type[BaseModel], location: Location) -> list[str]:
    """The settings that exist in the table at `location`."""
    table = root
    for part in location:
        if isinstance(part, str):
            annotation = table.model_fields[part].annotation
            inner = next((arg for arg in typing.get_args(annotation) if arg is not Ellipsis), annotation)
            table = typing.cast(type[BaseModel], inner)
    return list(table.model_fields)
