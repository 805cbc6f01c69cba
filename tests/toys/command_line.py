"""Run `umbel …` as an operator does, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path


def umbel(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command without the settings of this shell."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("UMBEL_")}
    command = [sys.executable, "-m", "umbel.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def refusal(*arguments: str | Path) -> str:
    """Return the message of a command that fails: on stderr only, after `umbel: `."""
    ended = umbel(*arguments)
    assert ended.returncode == 1, ended
    assert ended.stdout == ""
    assert ended.stderr.startswith("umbel: ")
    assert "Traceback" not in ended.stderr
    return ended.stderr.removeprefix("umbel: ").removesuffix("\n")
