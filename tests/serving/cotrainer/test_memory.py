"""Memory is measured and added up: of the process, of a training step, and of training's own pool."""

import mmap
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from scripts.tools.repository import REPOSITORY
from serving.cotrainer.memory import Arena, Footprint, out_of_memory, private_bytes
from serving.cotrainer.quantum import Pieces
from serving.cotrainer.trainer import LoraTrainer
from umbel.base.shapes import LINEARS
from umbel.site.memory import Training, kept_per_token, kv_bytes_per_token


def test_private_memory_grows_by_what_is_written() -> None:
    before = private_bytes()
    with mmap.mmap(-1, 16 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
        held.write(b"x" * len(held))
        assert private_bytes() - before >= 12 << 20


FREED = """
from serving.cotrainer.memory import give_back, private_bytes
held = [bytes([number % 256]) * 100_000 for number in range(200)]
before = private_bytes()
del held
give_back()
print(before - private_bytes())
"""


def test_memory_that_was_freed_can_be_given_back() -> None:
    """In a process of its own: in that of the tests other threads take and free memory, too."""
    given = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert int(given.stdout) >= 12 << 20


def test_a_footprint_keeps_the_order_of_its_stages() -> None:
    footprint = Footprint()
    for stage in ("view", "before", "lora"):
        footprint.measure(stage)
    assert list(footprint.private) == ["view", "before", "lora"]
    assert all(footprint.private.values())


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("a bug"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_failed_allocations_are_told_from_other_errors(error: Exception, is_it: bool) -> None:
    assert out_of_memory(error) is is_it


@pytest.mark.parametrize("ask", [lambda: torch.empty(1 << 60, dtype=torch.uint8), lambda: np.empty(1 << 60, np.uint8)])
def test_real_failed_allocations_are_recognised(ask: Callable[[], object]) -> None:
    with pytest.raises((RuntimeError, MemoryError)) as raised:
        ask()
    assert out_of_memory(raised.value)


def test_keys_and_values_of_a_token_are_those_of_the_real_cache(tiny_qwen3: Path) -> None:
    """Qwen3, whose heads are wider than hidden / heads."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_qwen3, dtype=torch.float32)
    with torch.no_grad():
        cache = model(input_ids=torch.ones(1, 5, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert kv_bytes_per_token(model.config.to_dict(), itemsize=4) == held / 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_what_a_layer_keeps_is_what_was_added_up(
    request: pytest.FixtureRequest, family: str, dtype: torch.dtype
) -> None:
    """Tensors that autograd saves during the forward pass, and the inputs that wait for the backward one."""
    base = transformers.AutoModelForCausalLM.from_pretrained(request.getfixturevalue(f"tiny_{family}"), dtype=dtype)
    trainer = LoraTrainer(base, max_rank=8, target_modules=LINEARS, seq_len=16, pieces=Pieces.whole(2, 16))
    sizes = Training(8, LINEARS, dtype.itemsize, 2, 16)
    kept = Kept(base)
    step = trainer.rehearse(2, 16)
    with torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda kept: kept):
        for quantum in step:
            if quantum.kind == "head":
                break
    step.close()
    attention, mlp = kept_per_token(base.config.to_dict(), sizes)
    layers, tokens = base.config.num_hidden_layers, 2 * 16
    hidden, copied = base.config.hidden_size, dtype is torch.bfloat16
    on_tape = 2 * layers * hidden * 2 if copied else 0  # the inputs themselves, where autograd saves copies of them
    unneeded = hidden * (dtype.itemsize + 4 * copied) + 4  # the first norm's: no gradient goes into the embedding
    found = kept.bytes / tokens + on_tape
    assert layers * (attention + mlp) - unneeded <= found <= layers * (attention + mlp)


class Kept:
    """Bytes that autograd saves, weights left out, each storage once."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._weights = {one.untyped_storage().data_ptr() for one in (*model.parameters(), *model.buffers())}
        self._sizes: dict[int, int] = {}

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._weights:
            self._sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def bytes(self) -> int:
        return sum(self._sizes.values())


class ToyAllocator:
    """A device of 100 bytes, of which the engine holds 40; blocks of the pool are kept."""

    def __init__(self) -> None:
        self.engine, self.pooled = 40, 0
        self.allowed: int | None = None
        self.inside = False

    def reserved(self) -> int:
        return self.engine + self.pooled

    def allow(self, reserved: int | None) -> None:
        self.allowed = reserved

    @contextmanager
    def pool(self) -> Iterator[None]:
        self.inside = True
        yield
        self.inside = False

    def allocate(self, size: int) -> None:
        assert self.inside
        if self.allowed is not None and self.reserved() + size > self.allowed:
            raise torch.OutOfMemoryError
        self.pooled += size


def test_an_arena_takes_no_more_than_its_limit_whatever_the_engine_takes() -> None:
    device = ToyAllocator()
    arena = Arena(device, limit=30)
    for size, engine in ((10, 40), (15, 55), (0, 20)):
        device.engine = engine
        with arena.using():
            device.allocate(size)
        assert device.allowed is None, "the engine is not bounded"
    assert arena.held == 25
    with pytest.raises(torch.OutOfMemoryError), arena.using():
        device.allocate(6)
    assert device.allowed is None
    with arena.using():
        device.allocate(5)
    assert arena.held == device.pooled == 30


def test_an_arena_without_a_limit_is_only_apart() -> None:
    device = ToyAllocator()
    with Arena(device, limit=None).using():
        device.allocate(1000)
    assert device.pooled == 1000
