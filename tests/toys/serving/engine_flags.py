"""`config`: a site's settings for a start of SGLang; `words`: the values of a flag on its command line."""

from pathlib import Path
from typing import Any

from umbel.site.config import SiteConfig


def config(folder: Path, extra: dict[str, Any] | None = None, **engine: Any) -> SiteConfig:
    return SiteConfig(
        site={"name": "clinic-a", "state_dir": folder / "state"},
        model={"path": folder / "base", "served_name": "tiny"},
        adapter=[{"name": "support"}],
        engine={"port": 30000, "extra_args": extra or {}, **engine},
        training={"data": folder / "train.jsonl"},
    )


def words(line: list[str], flag: str) -> list[str]:
    """Return the words that follow a flag, up to the next flag."""
    assert line.count(flag) == 1, (flag, line)
    rest = line[line.index(flag) + 1 :]
    return rest[: next((at for at, word in enumerate(rest) if word.startswith("--")), len(rest))]
