"""How much memory is this process's own, and how much of it a piece of work takes at its peak."""

import ctypes
from pathlib import Path
from typing import Any

import torch


def private_bytes() -> int:
    """Private memory of this process (Linux): what would be free again if it ended."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


def give_back() -> None:
    """Return freed heap memory to the system; glibc keeps it otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class PeakBytes:
    """Counts, while it is entered, the memory that forward and backward passes of a model take beside its weights.

    On CUDA the allocator knows. On a CPU nobody does, so what autograd keeps is counted, and once more the largest
    tensor among it: a backward pass holds its gradient too.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._tensors = [*model.parameters(), *model.buffers()]
        self._cuda = self._tensors[0].is_cuda
        self._kept: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)
        self._weights: set[int] = set()
        self._before = 0
        self.bytes = 0

    def __enter__(self) -> "PeakBytes":
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            self._weights = {tensor.untyped_storage().data_ptr() for tensor in self._tensors}
            self._hooks.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._cuda:
            self.bytes = torch.cuda.max_memory_allocated() - self._before
        else:
            self._hooks.__exit__(*exception)
            self.bytes = sum(self._kept.values()) + max(self._kept.values(), default=0)

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._weights:
            self._kept[storage.data_ptr()] = storage.nbytes()
        return tensor
