"""Site files for tests: one that can be loaded, with room for more, and the lines of a refusal."""

from pathlib import Path

import pytest

from umbel.errors import ConfigError
from umbel.site.config import SiteConfig

GOOD = """
[site]
name = "clinic-a"
state_dir = "state"
[model]
path = "base"
[[adapter]]
name = "support"
[engine]
port = 30000
{engine}
[training]
data = "private/train.jsonl"
{training}
{more}
"""
GUARD = '[[shadow.guard]]\nname = "triage"\ndata = "guards/triage.jsonl"\n'


def load(folder: Path, text: str | None = None, **parts: str) -> SiteConfig:
    file = folder / "site.toml"
    file.write_text(text if text is not None else GOOD.format(**{"engine": "", "training": "", "more": "", **parts}))
    return SiteConfig.load(file)


def refusal(folder: Path, text: str | None = None, **parts: str) -> list[str]:
    """Return the lines of a refusal, each without the file's name that it begins with."""
    with pytest.raises(ConfigError) as error:
        load(folder, text, **parts)
    lines = str(error.value).splitlines()
    assert all(line.startswith(f"{folder / 'site.toml'}: ") for line in lines), lines
    return [line.removeprefix(f"{folder / 'site.toml'}: ") for line in lines]
