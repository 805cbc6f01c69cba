"""Memory is measured: what is private to the process, and what a pass takes beside the model's weights."""

import mmap
from pathlib import Path

import torch
import transformers

from serving.cotrainer.memory import Footprint, PeakBytes, give_back, kv_bytes_per_token, private_bytes


def test_private_memory_grows_by_what_is_written() -> None:
    before = private_bytes()
    with mmap.mmap(-1, 16 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
        held.write(b"x" * len(held))
        assert private_bytes() - before >= 12 << 20


def test_memory_that_was_freed_can_be_given_back() -> None:
    held = [bytes([number % 256]) * 100_000 for number in range(200)]
    before = private_bytes()
    del held
    give_back()
    assert before - private_bytes() >= 12 << 20


def test_a_footprint_keeps_the_order_of_its_stages() -> None:
    footprint = Footprint()
    for stage in ("view", "before", "lora"):
        footprint.measure(stage)
    assert list(footprint.private) == ["view", "before", "lora"]
    assert all(footprint.private.values())


def test_the_peak_is_what_autograd_keeps_and_its_largest_once_more() -> None:
    model = torch.nn.Linear(8, 4, bias=False)
    inputs = torch.ones(100, 8, requires_grad=True)
    with PeakBytes(model) as peak:
        model(inputs).exp().sum().backward()
    kept = [100 * 8 * 4, 100 * 4 * 4]  # the input of the layer, the output of exp; not the weights
    assert peak.bytes == sum(kept) + max(kept)


def test_without_a_graph_nothing_is_taken() -> None:
    model = torch.nn.Linear(8, 4)
    with PeakBytes(model) as peak, torch.no_grad():
        model(torch.ones(100, 8))
    assert peak.bytes == 0


def test_keys_and_values_of_a_token_are_those_of_the_real_cache(tiny_qwen3: Path) -> None:
    """Qwen3, whose heads are wider than hidden / heads."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_qwen3, dtype=torch.float32)
    with torch.no_grad():
        cache = model(input_ids=torch.ones(1, 5, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert kv_bytes_per_token(model.config, itemsize=4) == held / 5
