"""Environment variables that set something in a site file: which there are, and which one is to blame for a mistake."""

import difflib
import json
import os
import re
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic_settings import EnvSettingsSource

PREFIX = "UMBEL_SITE__"
"""Beginning of their names."""
LISTS = {
    ("adapter",): '[{"name": "support"}]',
    ("serve",): '[{"name": "legal", "path": "adapters/legal"}]',
    ("shadow", "guard"): '[{"name": "triage", "data": "triage.jsonl"}]',
}
"""Path of a list of tables → how a variable sets it: as a whole, in JSON."""
Setting = tuple[str, ...]
"""Path to a setting, such as ("engine", "port"), or to a whole table: ("engine",)."""


class Environment(EnvSettingsSource):
    """Reads the variables; a flag of SGLang that has a variable of its own is what JSON makes of it, or else a text."""

    def __call__(self) -> dict[str, Any]:
        found = super().__call__()
        engine = found.get("engine")
        flags = engine.get("extra_args") if isinstance(engine, dict) else None
        if isinstance(flags, dict):
            for setting in given():
                if len(setting) == 3 and setting[-1] in flags and isinstance(flags[setting[-1]], str):
                    flags[setting[-1]] = _json(flags[setting[-1]], flags[setting[-1]])
        return found


def given() -> dict[Setting, str]:
    """Return each setting that a variable names, existing or not → the variable."""
    return {
        tuple(name[len(PREFIX) :].lower().split("__")): name for name in os.environ if name.upper().startswith(PREFIX)
    }


def settings(root: type[BaseModel]) -> dict[Setting, Any]:
    """Return every table of a `root`, and every setting in a table that is not a list → its type."""
    found: dict[Setting, Any] = {(table,): field.annotation for table, field in root.model_fields.items()}
    for table, field in root.model_fields.items():
        model = _table(field.annotation)
        if model is not None:
            found |= {(table, key): inner.annotation for key, inner in model.model_fields.items()}
    return found


def mistakes(root: type[BaseModel]) -> dict[str, str]:
    """Return each variable that sets nothing, or is not the JSON that it must be → the mistake, with a hint."""
    known, found = settings(root), {}
    for setting, name in sorted(given().items()):
        whole = next((path for path in LISTS if setting[: len(path)] == path and setting != path), None)
        if setting in known:
            value = _json(os.environ[name], name) if _wants_json(known[setting]) else ""
            if value is name:
                found[name] = f"not JSON; write it such as '{_example(setting, known[setting])}'"
            elif value is None:
                found[name] = "null sets nothing; unset it"
        elif whole is not None:
            parent = PREFIX + "__".join(whole).upper()
            found[name] = f"a list of tables is set as a whole: {parent}='{LISTS[whole]}'"
        elif setting[:2] == ("engine", "env"):  # its case is lost here, so that another variable would be set
            found[name] = f'write it into [engine.env], or set {PREFIX}ENGINE__ENV to JSON such as {{"NAME": "value"}}'
        elif setting[:2] != ("engine", "extra_args") or len(setting) != 3:
            found[name] = "is no setting of a site; " + _nearest(name[len(PREFIX) :], known)
    for name in sorted(os.environ):
        if re.match(r"UMBEL_SITE_[^_]|UMBEL_SITES_", name, re.IGNORECASE):
            rest = re.sub(r"^UMBEL_SITES?_+", "", name, flags=re.IGNORECASE)
            found[name] = f"sets nothing: a setting of a site begins with {PREFIX}; " + _nearest(rest, known)
    return found


def blamed(location: Collection[int | str], kind: str = "", message: str = "") -> str | None:
    """Return the variable, or variables, that made the mistake at `location`; None where the file did.

    `kind` and `message` are pydantic's: what is missing is missing in the file, unless a variable sets the whole list;
    and what is wrong about a table is blamed on the variables whose settings the message names.
    """
    where, known = tuple(map(str, location)), given()
    words = set(re.findall(r"\w+", message.lower().replace("-", "_")))
    outer = [
        one
        for one in known
        if where[: len(one)] == one and _made(os.environ[known[one]], where[len(one) :], kind, words)
    ]
    if outer:
        return known[max(outer, key=len)]
    inner = [one for one in known if one[: len(where)] == where and one != where and one[-1] in words]
    return " and ".join(sorted(known[one] for one in inner)) or None


def under(location: Collection[int | str]) -> set[str]:
    """Return the variables that set something below `location`."""
    where = tuple(map(str, location))
    return {name for setting, name in given().items() if setting[: len(where)] == where and setting != where}


def name_of(table: str, key: str) -> str:
    """Return how a message names a setting: the variable that set it, or `[table].key`.

    >>> name_of("training", "data")
    '[training].data'
    """
    return blamed((table, key)) or f"[{table}].{key}"


def _made(text: str, rest: Setting, kind: str, words: set[str]) -> bool:
    """Return whether a variable's text made a mistake at `rest`, seen from the setting that it sets."""
    value = _json(text, text)
    if not rest:
        return kind != "value_error" or not isinstance(value, dict) or bool(words & value.keys())
    path = rest[:-1] if kind == "missing" else rest
    if kind == "missing" and not any(part.isdecimal() for part in path):
        return False
    for part in path:
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return False
    return True


def _json(text: str, otherwise: Any) -> Any:
    """Return what JSON makes of a text; `otherwise` where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return otherwise


def _parts(annotation: Any) -> Iterator[Any]:
    """Yield the members of a union, None left out; the annotation itself where it is no union."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        yield from (part for part in typing.get_args(annotation) if part is not type(None))
    else:
        yield annotation


def _table(annotation: Any) -> type[BaseModel] | None:
    """Return the model of a table, or of one that may be missing; None for anything else."""
    return next((one for one in _parts(annotation) if isinstance(one, type) and issubclass(one, BaseModel)), None)


def _wants_json(annotation: Any) -> bool:
    return any(_table(one) or typing.get_origin(one) in (tuple, list, dict) for one in _parts(annotation))


def _example(setting: Setting, annotation: Any) -> str:
    """Return JSON of the right form for a setting."""
    if setting in LISTS:
        return LISTS[setting]
    model = _table(annotation)
    if model is not None:
        return f'{{"{next(iter(model.model_fields))}": …}}'
    return '{"NAME": "value"}' if typing.get_origin(annotation) is dict else '["q_proj", "v_proj"]'


def _nearest(rest: str, known: Collection[Setting]) -> str:
    names = ["__".join(setting).upper() for setting in known]
    near = difflib.get_close_matches(rest.upper(), names, n=1, cutoff=0.6)
    return f"did you mean {PREFIX}{near[0]}?" if near else "unset it"
