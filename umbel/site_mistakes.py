"""What is wrong in a site file, in words: where, what, and what to write instead."""

import difflib
import typing
from collections.abc import Collection
from pathlib import Path

from pydantic import BaseModel, ValidationError

from umbel import site_environment

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
        blamed = site_environment.blamed(mistake["loc"]) if mistake["type"] != "missing" else None
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
