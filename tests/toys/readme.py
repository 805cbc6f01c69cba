"""`site_file`: the example site file of the README."""

import re

from scripts.tools.repository import REPOSITORY


def site_file() -> str:
    """Return the one example that begins with its name, `# clinic-a.toml`."""
    (shown,) = re.findall(r"```toml\n(# clinic-a\.toml.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    return str(shown)
