"""The page of the site file's settings, made from the docstrings of the settings themselves."""

import typing

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from scripts.tools.reference.page import code, head, table
from umbel.site.config import SiteConfig

INTRODUCTION = """
One TOML file per site. Order: defaults < file < environment: `UMBEL_SITE__ENGINE__PORT=30001` sets `[engine].port`.
Relative paths start at the file's folder, also those that variables set. `umbel check site.toml` checks the file
offline; with `--json` it prints every setting as it is resolved. `[[adapter]]` is a list of length one for now. The
settings of a run at the centre are in [run-configuration.md](run-configuration.md).

A variable holds a text or a number as it is, and a list or a table as JSON:
`UMBEL_SITE__ENGINE__TARGET_MODULES='["q_proj", "v_proj"]'`. Lists of tables are set as a whole:
`UMBEL_SITE__ADAPTER='[{"name": "support"}]'`. A flag of SGLang may have a variable of its own, read as JSON where it is
some: `UMBEL_SITE__ENGINE__EXTRA_ARGS__MAX_TOTAL_TOKENS=20000`. A mistake that a variable made is reported under the
variable's name.
"""
COLUMNS = ("key", "default", "meaning")


def render() -> str:
    """Return the whole page."""
    page = head("The site file", "the settings' docstrings in `umbel/site/sections.py`") + INTRODUCTION
    for name, field in SiteConfig.model_fields.items():
        page += _tables(name, field.annotation)
    return page


def _tables(name: str, annotation: typing.Any) -> str:
    """Write a section's table, and then those of the sections within it."""
    section = _section(annotation)
    assert section is not None
    title = f"[[{name}]]" if typing.get_origin(annotation) is tuple else f"[{name}]"
    fields = section.model_fields.items()
    inner = {key: field.annotation for key, field in fields if _section(field.annotation)}
    rows = [_row(key, section) for key in section.model_fields if key not in inner]
    return f"\n## `{title}`\n\n{table(COLUMNS, rows)}" + "".join(
        _tables(f"{name}.{key}", annotation) for key, annotation in inner.items()
    )


def _section(annotation: typing.Any) -> type[BaseModel] | None:
    """Return the settings of a table, or of each table of an array; None for a single setting."""
    kind = next(iter(typing.get_args(annotation)), annotation)
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _row(key: str, section: type[BaseModel]) -> tuple[str, str, str]:
    field = section.model_fields[key]
    default = field.get_default(call_default_factory=True)
    shown = "*required*" if default is PydanticUndefined else code(_plain(default))
    return code(key), shown, field.description or ""


def _plain(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return {"None": "unset", "{}": "empty"}.get(str(value), str(value))
