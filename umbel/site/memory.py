"""`training_bytes`, `choose_rung`: memory that training takes beside a base, by arithmetic on the base's config.json.

SGLang sizes its KV cache before anything can be measured, and `umbel check` has no engine, so the sizes of the tensors
that a training step keeps are added up here, in bytes. A *rung* is a size of micro-batch, with or without computing
activations again. On a CPU nothing measures memory, so the co-trainer takes these numbers there, too.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from umbel.base.packed import packing_of
from umbel.base.shapes import LINEARS, layer_shapes

HEAD_TOKENS = 256
"""Most tokens of a piece of the head: their logits over the whole vocabulary are the largest tensors of a step."""
SHARE = 0.6
"""Largest share of the KV cache's room that training takes where [training].memory_mb does not say."""
CPU_ROOM = 4 << 30
"""Bytes that KV cache and training share on a CPU, where all of the machine's memory would be there for the taking."""
CPU_TOKENS = 200_000
"""Most tokens of the KV cache on a CPU: of more, with a tiny base, SGLang's list of free ones would be slow."""
ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}
"""[engine].dtype → bytes of a number."""
FP32 = 4
COPIES = 5
"""Numbers in fp32 for each LoRA weight: itself, its gradient, AdamW's two moments, and FedProx's parent."""
PARKED = COPIES - 1
"""Those that a job keeps while another one has the turn: all but the gradient, which is zero between two steps."""
ASIDE = PARKED - 1
"""Those by which there are more of them while an evaluation has interrupted a job: it needs no parent."""
COPIED = PARKED - 1
"""Those in a checkpoint, which are copied to the host and written from there; the parent has a file of its own."""


@dataclass(frozen=True)
class Training:
    """The sizes that decide what training takes."""

    rank: int
    """Rank of the buffers, [engine].max_lora_rank."""
    target_modules: Collection[str]
    itemsize: int
    """Bytes of a number of the base."""
    micro_batch: int
    seq_len: int
    adapters: int = 1
    """Adapters whose jobs take turns; those of all but one wait."""
    on_cpu: bool = False
    """The host is the device, so that the copy of a checkpoint is in the memory that training shares with the cache."""


@dataclass(frozen=True)
class Rung:
    """A size of micro-batch and its memory."""

    rows: int
    recompute: bool
    """Activations are computed again instead of kept."""
    bytes: int
    """Peak of all that training takes, LoRA factors, moments and what is parked included."""


def ladder(micro_batch: int) -> list[int]:
    """Return the numbers of rows that are tried, the smallest first: powers of two, and `micro_batch` itself."""
    return sorted({1 << power for power in range(micro_batch.bit_length())} | {micro_batch})


def rungs(base: Mapping[str, Any], training: Training) -> list[Rung]:
    """Return every rung, the one to prefer first: activations kept, and as many rows as possible."""
    rows = ladder(training.micro_batch)[::-1]
    return [Rung(n, again, training_bytes(base, training, n, again)) for again in (False, True) for n in rows]


def choose_rung(base: Mapping[str, Any], training: Training, room: int) -> Rung | None:
    """Return the first rung that leaves 1 - `SHARE` of `room` bytes to the KV cache; None where there is none."""
    return next((rung for rung in rungs(base, training) if rung.bytes <= SHARE * room), None)


def training_bytes(base: Mapping[str, Any], training: Training, rows: int, recompute: bool) -> int:
    """Return the peak of training with micro-batches of `rows`, in bytes.

    It is the largest of two moments: the last piece of the head, and the backward pass of a sub-block, while all that
    the layers keep is still there. An evaluation keeps nothing, but the job that it has interrupted is parked, too.
    """
    tokens, layers, width = rows * training.seq_len, base["num_hidden_layers"], training.itemsize
    attention, mlp = kept_per_token(base, training)
    inputs = 2 * width * base["hidden_size"]  # of both sub-blocks of a layer
    kept = layers * inputs + max(attention, mlp) if recompute else layers * (attention + mlp)
    widest = max(base["hidden_size"], base["intermediate_size"], _heads(base)[0])
    working = tokens * widest * (2 * FP32 + 3 * width) + _unpacked_bytes(base, width)
    head = min(tokens, HEAD_TOKENS) * base["vocab_size"] * (3 * FP32 + width)
    state = state_bytes(base, training) + parked_bytes(base, training) + checkpoint_bytes(base, training)
    aside = ASIDE * FP32 * lora_elements(base, training.rank, training.target_modules)
    return int(state + max(tokens * kept, aside) + tokens * 2 * inputs + max(working, head))


def _unpacked_bytes(base: Mapping[str, Any], width: int) -> int:
    """Return what the largest linear layer of a packed base takes while it is unpacked; a CPU unpacks it in parts."""
    return width * max(map(math.prod, layer_shapes(base).values())) if packing_of(base) else 0


def kept_per_token(base: Mapping[str, Any], training: Training) -> tuple[int, int]:
    """Return the bytes per token that attention and the MLP of one layer keep for their backward pass."""
    hidden, inner, width = base["hidden_size"], base["intermediate_size"], training.itemsize
    q, kv, heads = _heads(base)
    adapted = set(training.target_modules)
    low = FP32 * training.rank  # what each adapted layer keeps of its A
    normed_in_fp32 = FP32 * (width != FP32)
    norm = hidden * (width + normed_in_fp32) + FP32  # its input, a copy in fp32, and its scale
    before = {"q_proj", "k_proj", "v_proj"} & adapted
    attention = norm + bool(before) * width * hidden + low * len(before)
    attention += 2 * width * (q + kv) + FP32 * heads  # q, k, v, the output, and the softmax's scale
    attention += ("o_proj" in adapted) * low
    if base["model_type"] == "qwen3":  # norms on q and k
        attention += FP32 * (q + kv) + FP32 * 2 * heads
    gates = {"gate_proj", "up_proj"} & adapted
    mlp = norm + bool(gates) * width * hidden + low * len(gates) + 3 * width * inner
    mlp += ("down_proj" in adapted) * (width * inner + low)
    return attention, mlp


def state_bytes(base: Mapping[str, Any], training: Training) -> int:
    """Return the bytes of the LoRA factors and all that has their size."""
    return COPIES * FP32 * lora_elements(base, training.rank, training.target_modules)


def parked_bytes(base: Mapping[str, Any], training: Training) -> int:
    """Return the bytes of the jobs that wait while another one trains, at most one for each other adapter."""
    waiting = training.adapters - 1
    return waiting * PARKED * FP32 * lora_elements(base, training.rank, training.target_modules)


def checkpoint_bytes(base: Mapping[str, Any], training: Training) -> int:
    """Return the bytes of the device in which a checkpoint waits to be written, one at a time: none but on a CPU."""
    return training.on_cpu * COPIED * FP32 * lora_elements(base, training.rank, training.target_modules)


def lora_elements(base: Mapping[str, Any], rank: int, target_modules: Collection[str]) -> int:
    """Return the number of weights of an adapter."""
    shapes = layer_shapes(base)
    per_layer = sum(sum(shapes[name]) for name in LINEARS if name in target_modules)
    return rank * per_layer * int(base["num_hidden_layers"])


def kv_bytes_per_token(base: Mapping[str, Any], itemsize: int) -> int:
    """Return the bytes of one token's keys and values in every layer; `itemsize` is that of the cache's numbers."""
    return 2 * int(base["num_hidden_layers"]) * _heads(base)[1] * itemsize


def _heads(base: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return the width of all queries, the width of all keys, and the number of heads of queries."""
    shapes = layer_shapes(base)
    return shapes["q_proj"][0], shapes["k_proj"][0], int(base["num_attention_heads"])
