"""A ServerApp in a process of its own, over toy sites, and over a registry that other runs use at the same time."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from scripts.tools.repository import REPOSITORY
from server.registry import run_lock
from tests.toys.federation import a_world


class Run:
    """A run of `rounds` rounds of one adapter, from its process's start: it waits for `go`."""

    def __init__(self, root: Path, adapter: str, rounds: int) -> None:
        command = [sys.executable, "-m", "tests.toys.several_runs", str(root), adapter, str(rounds)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY
        )

    def wait_ready(self) -> None:
        """Wait until it has imported everything."""
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n", self._process.communicate()[1]

    def go(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    @property
    def over(self) -> bool:
        return self._process.poll() is not None

    def end(self) -> tuple[int, str]:
        """Return the exit status and what was said on stderr, once it has ended."""
        _, said = self._process.communicate()
        return self._process.returncode, said


def _main(root: Path, adapter: str, rounds: int) -> None:
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(prefix="umbel-") as sockets,
        a_world(root, Path(sockets), patch) as world,
    ):
        print("ready", flush=True)
        sys.stdin.readline()
        root.mkdir(exist_ok=True)
        with run_lock.exclusive(root, adapter, 0.0):
            world.start(f"of {adapter}", adapter=adapter, rounds=rounds)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
