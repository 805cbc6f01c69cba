"""`Arena`, `out_of_memory`: memory that training takes beside the engine, kept apart from the engine's and bounded.

A failed allocation within training is told from other errors by `out_of_memory`: the trainer answers it with smaller
pieces, the job with its end, and the engine never hears of it. `Footprint` says what building the trainer took.
"""

import ctypes
import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from serving.cotrainer.quantum import Pieces
from umbel.errors import TrainingError

SCARCE = "UMBEL_SCARCE_MEMORY"
"""Variable that names a file with a number of rows. While the file is there, a larger micro-batch asks torch for more
memory than any machine has. Only tests set it."""
CPU_FAILURES = ("can't allocate memory", "not enough memory")
"""Words of the plain RuntimeError that torch raises where a CPU's memory is used up: on Linux, and elsewhere."""

OUT_OF_MEMORY = (
    "memory does not suffice for training; raise [training].memory_mb, or lower [training].seq_len or "
    "[engine].max_lora_rank"
)

logger = logging.getLogger(__name__)


@dataclass
class Footprint:
    """Memory of the trainer in the scheduler's process, measured once while the trainer is built."""

    shared_tensors: int = 0
    """Frozen parameters of the trainer whose storage is the engine's."""
    kv_tokens_given_up: int = 0
    """Tokens that the engine's KV cache would hold more without the memory that is kept for training."""
    private: dict[str, int] = field(default_factory=dict)
    """Stage of the build → private bytes of the process after it, in order."""

    def measure(self, stage: str) -> None:
        """Note the private memory of this process under the name of a stage."""
        self.private[stage] = private_bytes()


@dataclass(frozen=True)
class Reserve:
    """Memory that is kept for training, decided before the engine's KV cache is sized."""

    mb: int | None = None
    """MiB for all of training; None where nothing was decided, so that nothing bounds it."""
    kv_tokens: int = 0
    """Tokens that the KV cache would hold more without it: none where --max-total-tokens bounds the cache anyway."""


def private_bytes() -> int:
    """Return the private memory of this process (Linux): the bytes that would be free again if it ended."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


def give_back() -> None:
    """Return freed heap memory to the system; glibc keeps it otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error is a failed allocation: torch's on a device or on a CPU, numpy's, or Python's own."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in CPU_FAILURES)


class Room:
    """The sizes of pieces for which memory suffices: those that were assigned, until an allocation has failed."""

    def __init__(self, pieces: Pieces) -> None:
        self.assigned = pieces
        self._fits: Pieces | None = None  # the largest for which memory has sufficed, once it has not

    @property
    def pieces(self) -> Pieces:
        """Return the sizes that were assigned, or what memory has sufficed for."""
        return self.assigned if self._fits is None else self.assigned.within(self._fits)

    def shrink(self, error: Exception) -> None:
        """Go one rung down for want of memory, for good; raise any other error, and TrainingError below the last rung.

        Its caller lets go of the error, and so of what the failed quantum held, before it goes on.
        """
        if not out_of_memory(error):
            raise error
        failed, self._fits = self.pieces, self.pieces.smaller()
        logger.warning("memory did not suffice for %s; from now on %s: %s", failed, self._fits or "none", error)
        if self._fits is None:
            self._fits = failed
            raise TrainingError(f"{OUT_OF_MEMORY} (one row, activations computed again)") from None


def rehearse_shortage(rows: int, device: torch.device) -> None:
    """Fail as for want of memory if a test says that `rows` are too many (see `SCARCE`)."""
    file = os.environ.get(SCARCE)
    if file and Path(file).is_file() and rows > int(Path(file).read_text()):
        torch.empty(1 << 60, dtype=torch.uint8, device=device)


class Allocator(Protocol):
    """The calls of a device's caching allocator that an `Arena` needs."""

    def reserved(self) -> int:
        """Return the bytes that this process holds of the device, the engine's included."""

    def allow(self, reserved: int | None) -> None:
        """Let allocations fail that would raise `reserved` above this; None: no longer."""

    def pool(self) -> AbstractContextManager[Any]:
        """Return a context in which this thread's allocations come from training's own pool, and go back to it."""


class Arena:
    """Memory of training: its own pool, which may not take more of the device than `limit` bytes.

    Blocks that a quantum frees stay in the pool, so that what rehearsal has taken is there for every later quantum, and
    the engine's allocations neither use it nor are mixed with it. By reading only: no GPU has run `CudaAllocator`.
    """

    def __init__(self, allocator: Allocator, limit: int | None) -> None:
        self._allocator, self._limit = allocator, limit
        self.held = 0
        """Bytes of the device that the pool has taken."""

    @contextmanager
    def using(self) -> Iterator[None]:
        """Allocate from the arena on this thread. The cap holds for as long, since only training allocates then."""
        before = self._allocator.reserved()
        self._allocator.allow(None if self._limit is None else before + max(0, self._limit - self.held))
        try:
            with self._allocator.pool():
                yield
        finally:
            self._allocator.allow(None)
            self.held += max(0, self._allocator.reserved() - before)  # less where the engine's cache was given back


class CudaAllocator:
    """torch's caching allocator of one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.MemPool()
        self._total = torch.cuda.get_device_properties(device).total_memory

    def reserved(self) -> int:
        return int(torch.cuda.memory_stats_as_nested_dict(self._device)["reserved_bytes"]["all"]["current"])

    def allow(self, reserved: int | None) -> None:
        fraction = 1.0 if reserved is None else min(1.0, reserved / self._total)
        torch.cuda.set_per_process_memory_fraction(fraction, self._device)

    @contextmanager
    def pool(self) -> Iterator[None]:
        # A pool is of one thread; on its own threads autograd would allocate from the engine's.
        with torch.autograd.set_multithreading_enabled(False), torch.cuda.use_mem_pool(self._pool, self._device):
            yield


class PeakBytes:
    """Counts, while it is entered, the memory that is allocated on a CUDA device beside what was there before."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0
        self.bytes = 0
        """The peak, known once the context is left."""

    def __enter__(self) -> "PeakBytes":
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = torch.cuda.memory_allocated(self._device)
        return self

    def __exit__(self, *exception: Any) -> None:
        self.bytes = torch.cuda.max_memory_allocated(self._device) - self._before
