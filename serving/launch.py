"""`python -m serving.launch …`: run `sglang.launch_server` so that it ends with its parent, and on a CPU if need be.

The kernel kills the engine when the daemon dies. Without an accelerator, the engine gets the flags that
`serving.cpu_platform` needs, and leaves out an import that takes seconds. All of it happens in the engine's own
process, so that the daemon never imports torch.
"""

import ctypes
import itertools
import os
import runpy
import signal
import sys
from types import ModuleType
from typing import cast

from serving.run_dir import PARENT_VARIABLE
from umbel.site.memory import CPU_TOKENS

PR_SET_PDEATHSIG = 1
"""The option of prctl(2) that sets the signal a process gets when its parent dies."""
CPU_FLAGS: dict[str, str | None] = {
    "--device": "cpu",
    "--attention-backend": "torch_native",
    "--sampling-backend": "pytorch",
    "--lora-backend": "torch_native",
    "--max-total-tokens": str(CPU_TOKENS),
    # Nothing overlaps on a CPU: a first token would wait for the next iteration, and for a quantum, before it is sent.
    "--disable-overlap-schedule": None,
}
"""SGLang's flags for `serving.cpu_platform`, None for one without a value; the site file's own take precedence."""
NO_USE_ON_A_CPU = ("flashinfer", "cutlass", "quack")
"""Packages of CUDA kernels. To import them takes seconds and 150 MB in each of SGLang's processes, which do without
where they are not installed."""
NOT = "--no-"
"""Prefix of the words that stand for a flag without a value that the site file sets to false; SGLang has none such."""


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
    missing = {
        flag: value for flag, value in CPU_FLAGS.items() if not {flag, flag.replace("--", NOT, 1)} & set(arguments)
    }
    return [*arguments, *(word for pair in missing.items() for word in pair if word is not None)]


def has_accelerator() -> bool:
    """Return whether torch finds an accelerator. The import takes seconds, in which the parent may die."""
    import torch

    return torch.accelerator.is_available()


def spare_imports(arguments: list[str]) -> None:
    """Let this process find none of `NO_USE_ON_A_CPU` where the arguments say that the engine runs on a CPU."""
    if ("--device", "cpu") in itertools.pairwise(arguments):
        for package in NO_USE_ON_A_CPU:
            sys.modules[package] = cast(ModuleType, None)  # an import fails, as where it is not installed


if __name__ == "__main__":
    die_with_parent()
    if not has_accelerator():
        sys.argv[1:] = with_cpu_flags(sys.argv[1:])
    sys.argv[1:] = [word for word in sys.argv[1:] if not word.startswith(NOT)]
    spare_imports(sys.argv)
    runpy.run_module("sglang.launch_server", run_name="__main__")  # __main__ stays this module, for the processes below
elif __name__ == "__mp_main__":  # in each process that SGLang starts, before it imports anything else
    spare_imports(sys.argv)
