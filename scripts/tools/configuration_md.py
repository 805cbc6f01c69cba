"""Write docs/configuration.md from the docstrings of the settings themselves: `scripts/reference`."""

import tomllib
import typing

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from scripts.tools.repository import REPOSITORY
from umbel.config import SiteConfig

TARGET = REPOSITORY / "docs" / "configuration.md"
HEAD = """# Configuration

*Made by `scripts/tools/configuration_md.py` from the settings' own docstrings; a test holds it up to date.*

## The site file

One TOML file per site. Order: defaults < file < environment: `UMBEL_SITE__ENGINE__PORT=30001` sets `[engine].port`.
Relative paths start at the file's folder. `umbel check site.toml` validates it offline and prints what it means.
`[[adapter]]` is a list of length one for now.
"""
RUN = """
## The run configuration

`[tool.flwr.app.config]` in `pyproject.toml`; override with `flwr run APP CENTRE --run-config 'rounds=10 rank=16'`.

| key | default | meaning |
|---|---|---|
"""


def render() -> str:
    """The whole page."""
    tables = [HEAD]
    for name, field in SiteConfig.model_fields.items():
        tables += _tables(name, field.annotation)
    return "\n".join(tables) + "\n" + RUN + "\n".join(_run_rows()) + "\n"


def _tables(name: str, annotation: typing.Any) -> list[str]:
    """The lines of a section, and then those of the sections within."""
    section = _section(annotation)
    assert section is not None
    title = f"[[{name}]]" if typing.get_origin(annotation) is tuple else f"[{name}]"
    lines = [f"\n### `{title}`\n\n| key | default | meaning |\n|---|---|---|"]
    inner: list[str] = []
    for key, field in section.model_fields.items():
        if _section(field.annotation):
            inner += _tables(f"{name}.{key}", field.annotation)
        else:
            lines.append(_row(key, section))
    return lines + inner


def _section(annotation: typing.Any) -> type[BaseModel] | None:
    """The settings of a table, or of each table of an array; None for a single setting."""
    kind = next(iter(typing.get_args(annotation)), annotation)
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _row(key: str, section: type[BaseModel]) -> str:
    field = section.model_fields[key]
    default = field.get_default(call_default_factory=True)
    shown = "*required*" if default is PydanticUndefined else f"`{_plain(default)}`"
    return f"| `{key}` | {shown} | {' '.join((field.description or '').split())} |"


def _plain(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return {"None": "unset", "{}": "empty"}.get(str(value), str(value))


def _run_rows() -> list[str]:
    lines = (REPOSITORY / "pyproject.toml").read_text().splitlines()
    start = lines.index("[tool.flwr.app.config]") + 1
    rows = []
    for line in lines[start:]:
        if not line:
            break
        setting, _, comment = line.partition("#")
        key, value = next(iter(tomllib.loads(setting).items()))
        rows.append(f"| `{key}` | `{value}` | {comment.strip().replace('|', 'or')} |")
    return rows


if __name__ == "__main__":
    TARGET.write_text(render())
