"""The example site files: they load, the full one names every setting, and what it calls a default is one."""

import re
import tomllib
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from scripts.tools.repository import REPOSITORY
from tests.toys import readme
from umbel.site.config import SiteConfig

EXAMPLES = REPOSITORY / "examples"
NOT_THE_DEFAULT = {"shadow.watch_s", "shadow.canary_share", "shadow.mirror_share", "shadow.rollback_window_s",
                   "engine.extra_args", "engine.env", "shadow.guard", "adapter.guard", "serve"}  # fmt: skip
"""Keys of the full file with another value than their default; the file says so behind each."""


def test_every_site_file_loads_without_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UMBEL_SITE__ENGINE__PORT", raising=False)
    files = sorted(EXAMPLES.glob("site-*.toml"))
    assert [file.name for file in files] == ["site-alone.toml", "site-full.toml", "site-minimal.toml"]
    for file in files:
        config = SiteConfig.load(file)
        assert (config.site.name, config.adapters) == ("clinic-a", ("support",))


def test_the_minimal_file_is_the_readmes() -> None:
    assert tomllib.loads((EXAMPLES / "site-minimal.toml").read_text()) == tomllib.loads(readme.site_file())


def test_the_full_file_names_every_setting_and_no_other() -> None:
    written = tomllib.loads((EXAMPLES / "site-full.toml").read_text())
    assert sorted(_written(written, SiteConfig)) == sorted(name for name, _ in _settings(SiteConfig))


def test_the_full_file_has_the_defaults_but_where_it_says_otherwise() -> None:
    config = SiteConfig.load(EXAMPLES / "site-full.toml")
    different = {
        name
        for name, field in _settings(SiteConfig)
        if (default := field.get_default(call_default_factory=True)) not in (None, PydanticUndefined)
        and _value(config, name) != default
    }
    assert different | {"shadow.guard", "adapter.guard", "serve"} == NOT_THE_DEFAULT


def test_every_key_has_a_remark() -> None:
    for file in EXAMPLES.glob("*.toml"):
        bare = [line for line in file.read_text().splitlines() if re.match(r"\w[\w-]* = ", line) and " # " not in line]
        assert not bare, file.name


def _settings(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield the dotted name of every single setting, those of tables within tables included."""
    for key, field in section.model_fields.items():
        inner = _section(field.annotation)
        if inner is None:
            yield prefix + key, field
        else:
            yield from _settings(inner, f"{prefix}{key}.")


def _written(content: dict[str, Any], section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of every setting in a parsed file; free tables such as [engine.env] are one setting."""
    for key, value in content.items():
        inner = _section(section.model_fields[key].annotation) if key in section.model_fields else None
        if inner is None:
            yield prefix + key
        else:
            (table,) = value if isinstance(value, list) else [value]
            yield from _written(table, inner, f"{prefix}{key}.")


def _section(annotation: Any) -> type[BaseModel] | None:
    """Return the class of a table, of each table of an array, or of a table that may be missing; else None."""
    for kind in (annotation, *typing.get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _value(config: SiteConfig, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value[0] if isinstance(value, tuple) else value, part)
    return value.name if isinstance(value, Path) else value
