"""`python -m serving.launch …` is `python -m sglang.launch_server …`, ended by the kernel when its parent dies."""

import ctypes
import os
import runpy
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask Linux to kill this process when the daemon that started it is gone, however it went."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked
        sys.exit("the parent process is gone")


if __name__ == "__main__":
    die_with_parent()
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
