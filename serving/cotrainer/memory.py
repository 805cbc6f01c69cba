"""`Footprint`, `PeakBytes`: memory that the trainer shares with the engine, takes from it, and needs at its peak."""

import ctypes
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass
class Footprint:
    """Memory of the trainer in the scheduler's process, measured once while the trainer is built."""

    shared_tensors: int = 0
    """Frozen parameters of the trainer whose storage is the engine's."""
    kv_tokens_given_up: int = 0
    """Tokens that the memory kept for training would hold in the KV cache."""
    private: dict[str, int] = field(default_factory=dict)
    """Stage of the build → private bytes of the process after it, in order."""

    def measure(self, stage: str) -> None:
        """Note the private memory of this process under the name of a stage."""
        self.private[stage] = private_bytes()


def private_bytes() -> int:
    """Return the private memory of this process (Linux): the bytes that would be free again if it ended."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


def give_back() -> None:
    """Return freed heap memory to the system; glibc keeps it otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def kv_bytes_per_token(config: Any, itemsize: int) -> int:
    """Return the bytes of one token's keys and values in every layer of a model with this Hugging Face config."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * itemsize)


class PeakBytes:
    """Counts, while it is entered, the memory that forward and backward passes of a model take beside its weights.

    On CUDA the allocator counts. On a CPU nothing does, so the tensors that autograd keeps are added up, and the
    largest of them is counted twice: a backward pass holds its gradient as well.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._tensors = [*model.parameters(), *model.buffers()]
        self._cuda = self._tensors[0].is_cuda
        self._kept: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)
        self._weights: set[int] = set()
        self._before = 0
        self.bytes = 0
        """The peak, known once the context is left."""

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
