"""`site_file`: the example site file of the README."""

import re

from scripts.tools.repository import REPOSITORY


def site_file() -> str:
    """Return the one example that begins with its name, `# clinic-a.toml`."""
    (shown,) = re.findall(r"```toml\n(# clinic-a\.toml.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    return str(shown)


def commands(heading: str) -> list[str]:
    """Return the lines of the shell block below a heading, without their remarks."""
    part = (REPOSITORY / "README.md").read_text().partition(f"\n## {heading}\n")[2]
    shown = re.search(r"```sh\n(.*?)```", part, re.DOTALL)
    assert shown is not None, heading
    return [line.partition(" #")[0].strip() for line in shown[1].splitlines()]
