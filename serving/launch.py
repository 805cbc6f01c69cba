"""`python -m serving.launch …`: run `sglang.launch_server` so that it ends with its parent, and on a CPU if need be.

The kernel kills the engine when the daemon dies. Without an accelerator, the engine gets the flags that
`serving.cpu_platform` needs. Both happen in the engine's own process, so that the daemon never imports torch.
"""

import ctypes
import os
import runpy
import signal
import sys

from serving.run_dir import PARENT_VARIABLE

PR_SET_PDEATHSIG = 1
"""The option of prctl(2) that sets the signal a process gets when its parent dies."""
CPU_FLAGS = {
    "--device": "cpu",
    "--attention-backend": "torch_native",
    "--sampling-backend": "pytorch",
    "--lora-backend": "torch_native",
    "--max-total-tokens": "20000",  # SGLang would reserve 70 % of the memory for its KV cache
}
"""SGLang's flags for `serving.cpu_platform`; the site file's own flags take precedence."""


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent, the daemon, dies in any way.

    Raises SystemExit if the parent is dead already: the one whose pid is in the environment, where it says its own.
    """
    parent = int(os.environ.get(PARENT_VARIABLE) or os.getppid())
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before prctl took effect, and the kernel would never tell
        sys.exit("the parent process is gone")


def with_cpu_flags(arguments: list[str]) -> list[str]:
    """Return the arguments with the missing ones of `CPU_FLAGS` added."""
    missing = {flag: value for flag, value in CPU_FLAGS.items() if flag not in arguments}
    return [*arguments, *(word for pair in missing.items() for word in pair)]


def has_accelerator() -> bool:
    """Return whether torch finds an accelerator. The import takes seconds, in which the parent may die."""
    import torch

    return torch.accelerator.is_available()


if __name__ == "__main__":
    die_with_parent()
    if not has_accelerator():
        sys.argv[1:] = with_cpu_flags(sys.argv[1:])
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
