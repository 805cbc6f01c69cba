"""Read a site file as TOML, make its paths absolute, and explain its mistakes; `umbel.site.config` has the tables."""

import difflib
import os
import tomllib
import typing
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from umbel.errors import ConfigError
from umbel.site import variables


def read(path: Path) -> dict[str, Any]:
    """Return the tables of a site file. Raises ConfigError for a file that cannot be read or is not TOML."""
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, UnicodeDecodeError, or nested too deep
        raise ConfigError(f"{path}: not TOML: {error}") from error


M = TypeVar("M", bound=BaseModel)


def rooted(model: M, file: Path, location: tuple[str, ...] = ()) -> M:
    """Return the settings with absolute paths: relative ones start at the site file's folder, also a variable's.

    Raises ConfigError for a path with a null byte.
    """
    changes: dict[str, Any] = {}
    for key, value in model:
        where = (*location, key)
        if isinstance(value, Path):
            changes[key] = _absolute(value, file, where)
        elif isinstance(value, BaseModel):
            changes[key] = rooted(value, file, where)
        elif isinstance(value, tuple):
            changes[key] = tuple(rooted(one, file, where) if isinstance(one, BaseModel) else one for one in value)
    return model.model_copy(update=changes)


def _absolute(value: Path, file: Path, where: tuple[str, ...]) -> Path:
    if "\0" in str(value):
        raise ConfigError(
            f"{variables.blamed(where) or file}: {'.'.join(where)} holds a null byte; no file is called so"
        )
    return file.parent.resolve() / os.path.expanduser(value)  # leaves `~nobody` as it is


Location = tuple[int | str, ...]
"""Path to a value as pydantic reports it, such as ("shadow", "guard", 0, "data")."""


def explain(root: type[BaseModel], found: ValidationError, path: Path, told: Collection[str]) -> list[str]:
    """Explain each mistake in a `root` in a line that begins with the file or, where a variable set it, the variable.

    Mistakes of the variables in `told` are left out, because they were reported before.
    """
    lines = []
    for mistake in found.errors():
        if found.error_count() > 1 and mistake["type"] == "too_short":
            continue  # a tuple whose item is wrong is also "too short" to pydantic: the item's own line says it
        where, kind = mistake["loc"], mistake["type"]
        blamed = variables.blamed(where, kind, mistake["msg"])
        if blamed in told or (kind.endswith("_type") and variables.under(where) & set(told)):
            continue
        how = variables.LISTS.get(tuple(map(str, where)), "") if blamed and kind == "tuple_type" else ""
        said = f"{_dotted(where)}: a list of tables; write it such as '{how}'" if how else ""
        lines.append(f"{blamed or path}: {said or _explain(root, where, kind, mistake['msg'])}")
    return lines


def _explain(root: type[BaseModel], location: Location, kind: str, message: str) -> str:
    where = _dotted(location)
    if kind == "extra_forbidden":
        siblings = _keys(root, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), siblings, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(siblings)}"
        return f"{where} is not a setting; {hint}"
    if kind == "missing":
        return f"{where} is missing"
    if kind == "tuple_type" and location in variables.LISTS:
        return f"{where}: write [[{where}]], with double brackets: it is a list of tables"
    told = message.removeprefix("Value error, ")
    return f"{where}: {told}" if where else told


def _dotted(location: Location) -> str:
    return ".".join(map(str, location))


def _keys(root: type[BaseModel], location: Location) -> list[str]:
    """Return the names of the settings that the table at `location` can have."""
    table = root
    for part in location:
        if isinstance(part, str):
            annotation = table.model_fields[part].annotation
            inner = next((arg for arg in typing.get_args(annotation) if arg is not Ellipsis), annotation)
            table = typing.cast(type[BaseModel], inner)
    return list(table.model_fields)
