"""Runs `umbel adapt …` whose own daemon, where it starts one, is quick_site.py's: no engine, no model.

python tests/toys/sites/quick_adapt.py site.toml --rounds 3
"""

import sys
from pathlib import Path
from typing import Any

from umbel.cli import daemon
from umbel.cli.main import app

QUICK_SITE = Path(__file__).with_name("quick_site.py")
start = daemon.OwnDaemon.__init__


def start_quick(self: daemon.OwnDaemon, config: Any, site_file: Path, tell: Any) -> None:
    start(self, config, site_file, tell)
    self._command = [sys.executable, str(QUICK_SITE), str(site_file)]


if __name__ == "__main__":
    daemon.OwnDaemon.__init__ = start_quick  # type: ignore[method-assign]
    app(["adapt", *sys.argv[1:]])
