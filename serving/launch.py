"""`python -m serving.launch …` is `python -m sglang.launch_server …` with two things seen to first.

It is ended by the kernel when its parent dies, and without an accelerator it gets the flags of `serving.cpu_platform`.
Both are decided here, in the engine's own process, so that the daemon never has to import torch.
"""

import ctypes
import os
import runpy
import signal
import sys

import torch

PR_SET_PDEATHSIG = 1
CPU_FLAGS = {
    "--device": "cpu",
    "--attention-backend": "torch_native",
    "--sampling-backend": "pytorch",
    "--lora-backend": "torch_native",
    "--max-total-tokens": "20000",  # SGLang would reserve 70 % of the memory for its KV cache
}
"""What SGLang is started with to run on `serving.cpu_platform`; what the site file says comes first."""


def die_with_parent() -> None:
    """Ask Linux to kill this process when the daemon that started it is gone, however it went."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked
        sys.exit("the parent process is gone")


def with_cpu_flags(arguments: list[str]) -> list[str]:
    """The arguments, completed for the CPU; what is there already stays."""
    missing = {flag: value for flag, value in CPU_FLAGS.items() if flag not in arguments}
    return [*arguments, *(word for pair in missing.items() for word in pair)]


if __name__ == "__main__":
    die_with_parent()
    if not torch.accelerator.is_available():
        sys.argv[1:] = with_cpu_flags(sys.argv[1:])
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
