"""`site_toml`: the text of a site file, from the settings that matter to the caller."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

Table = Mapping[str, object]
"""Key → value: a text, a path, a number, a truth value, or a list of them."""
Tables = Mapping[str, Table | Sequence[Table]]
"""A table's dotted name → the table; or a list of them, for an array of tables."""
_ORDER = ("site", "model", "adapter", "serve", "engine", "slo", "training")


def site_toml(
    tables: Tables | None = None,
    *,
    name: str = "clinic-a",
    model: str | Path = "base",
    port: int = 30000,
    data: str | Path = "train.jsonl",
    comments: Mapping[str, str] | None = None,
) -> str:
    """Return a site file: the settings without a default, and whatever `tables` adds to them or puts in their place.

    `tables` maps a table's dotted name to its keys, and an array of tables to a list; `comments` maps a setting's
    dotted name to the remark behind it:

        site_toml({"engine": {"dtype": "float32"}, "engine.env": {"OMP_NUM_THREADS": "8"}}, port=31000)
        site_toml(comments={"training.data": "never leaves this machine"})

    Raises TypeError or ValueError for a value that TOML has no form for (None, infinity).
    """
    merged: dict[str, Table | Sequence[Table]] = {
        "site": {"name": name, "state_dir": "state"},
        "model": {"path": model},
        "adapter": [{"name": "support"}],
        "engine": {"port": port},
        "training": {"data": data},
    }
    for table, keys in (tables or {}).items():
        before = merged.get(table)
        merged[table] = {**before, **keys} if isinstance(before, Mapping) and isinstance(keys, Mapping) else keys
    ordered = sorted(merged, key=_place)  # stable: tables of the same root stay in the caller's order
    return "\n".join("\n".join(_lines(table, merged[table], comments or {})) + "\n" for table in ordered)


def toml_value(value: object) -> str:
    """Return a value as TOML writes it. Raises TypeError or ValueError where TOML has no form for it."""
    if isinstance(value, Mapping) or value is None:
        raise TypeError(f"{value!r} is not a single TOML value; name a table for it, or leave the key out")
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    text = json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False, allow_nan=False)
    return text.replace("\x7f", "\\u007f")  # else TOML's basic values are written as JSON's are


def _place(table: str) -> int:
    root = table.partition(".")[0]
    return _ORDER.index(root) if root in _ORDER else len(_ORDER)


def _lines(table: str, content: Table | Sequence[Table], comments: Mapping[str, str]) -> Iterator[str]:
    """Yield a table's header and keys, or those of each table of an array, remarks aligned."""
    header, entries = (f"[{table}]", [content]) if isinstance(content, Mapping) else (f"[[{table}]]", content)
    for entry in entries:
        settings = {key: f"{key} = {toml_value(value)}" for key, value in entry.items()}
        width = max((len(line) for key, line in settings.items() if f"{table}.{key}" in comments), default=0)
        yield header
        for key, line in settings.items():
            comment = comments.get(f"{table}.{key}")
            yield f"{line:{width}}  # {comment}" if comment else line
