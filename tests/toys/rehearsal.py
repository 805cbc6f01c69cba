"""`Rehearsals`: run processes that die at a fault point, each a cheap fork of one that has imported everything."""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable

from scripts.tools.repository import REPOSITORY
from umbel.faults import VARIABLE


class Rehearsals:
    """Runs a module's life again and again, each time in a process of its own; use as a context manager."""

    def __init__(self, module: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=REPOSITORY,
        )  # fmt: skip

    def __enter__(self) -> "Rehearsals":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()
        assert self._process.returncode == 0

    def run(self, die_at: str, *arguments: object) -> int:
        """Run a life with UMBEL_DIE_AT=`die_at`; return its exit status, negative for the signal that ended it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([die_at, *map(str, arguments)]), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())


def rehearse(life: Callable[..., None]) -> None:
    """Run one life in a fork for each line on stdin; the module that `Rehearsals` starts calls this."""
    for line in sys.stdin:
        die_at, *arguments = json.loads(line)
        child = os.fork()
        if child == 0:
            os.environ[VARIABLE] = die_at
            status = 1
            try:
                life(*arguments)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
