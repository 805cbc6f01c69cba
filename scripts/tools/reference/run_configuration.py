"""The page of a run's settings at the centre, made from the comments of `[tool.flwr.app.config]` in pyproject.toml."""

from collections.abc import Iterator

from scripts.tools.reference.page import code, head, table
from scripts.tools.repository import REPOSITORY

SECTION = "[tool.flwr.app.config]"
INTRODUCTION = f"""
The defaults are in `{SECTION}` of `pyproject.toml`; override them with
`flwr run APP CENTRE --run-config 'rounds=10 rank=16'`. The settings of a site are in
[configuration.md](configuration.md), the strategies in [strategies.md](../strategies.md).

"""


def render() -> str:
    """Return the whole page."""
    page = head("The run configuration", f"the comments of `{SECTION}` in `pyproject.toml`") + INTRODUCTION
    return page + table(("key", "default", "meaning"), _rows())


def _rows() -> Iterator[tuple[str, str, str]]:
    lines = (REPOSITORY / "pyproject.toml").read_text().splitlines()
    for line in lines[lines.index(SECTION) + 1 :]:
        if not line:
            return
        setting, _, comment = line.partition("#")
        key, _, default = setting.partition("=")
        yield code(key.strip()), code(default.strip()), comment.strip().replace(" | ", " or ")
