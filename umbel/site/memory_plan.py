"""`MemoryPlan`: how a site's device will be divided among base, adapters, SGLang, training and KV cache, in bytes.

The rules are SGLang 0.5.23's, for one device (`arg_groups/memory_hook.py`): it keeps a part of the device for itself,
and the KV cache gets what base and adapters leave. umbel takes training's part off that.
"""

import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from umbel.base.shapes import base_bytes, read_config
from umbel.site import flags
from umbel.site.config import SiteConfig
from umbel.site.memory import (
    CPU_ROOM,
    CPU_TOKENS,
    ITEMSIZE,
    SHARE,
    Training,
    choose_rung,
    kv_bytes_per_token,
    lora_elements,
    parked_bytes,
    rungs,
)
from umbel.site.slow_dtype import on_cpu

GB, MIB = 10**9, 1 << 20
CONTEXT = 512 * MIB
"""What CUDA itself takes of a device in one process."""
SIZES = ((20, 2048, 8), (35, 4096, 48), (60, 4096, 32), (160, 8192, 256))
"""(GiB that the device is below, tokens of a chunk of a prompt, requests in a CUDA graph): SGLang's defaults."""
LARGEST = (16384, 512)
CAPTURED = (*range(4, 33, 4), *range(48, 257, 16), *range(288, 513, 32), *range(576, 1025, 64), *range(1280, 4097, 256))
"""Tokens of a prompt's chunk for which SGLang captures a CUDA graph; above them, each multiple of 512."""


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of one device, or of the part of a machine's memory that KV cache and training share on a CPU."""

    device: int | None
    """All of the device; None for a CPU."""
    weights: int
    saved: int
    """What packing its linear layers in 4 bits saves of the base; 0 for a base that is not packed."""
    adapters: int
    """Slots of the adapters that are served."""
    runtime: int
    """What SGLang keeps for activations and CUDA graphs, and CUDA for itself; 0 for a CPU."""
    training: int
    parked: int
    """Part of it in which the jobs of other adapters wait for their turn; 0 for a site with one adapter."""
    rows: int | None
    """Rows of the largest micro-batch that fits; None if none does."""
    recompute: bool
    least: int
    """What training needs at least, with one row at a time."""
    room: int
    """What KV cache and training share."""
    kv_bytes_per_token: int
    most_kv_tokens: int | None
    """The limit of --max-total-tokens."""

    @classmethod
    def of(cls, config: SiteConfig, device: int | None) -> Self:
        """Divide a device of so many bytes; None: a CPU. Raises ConfigError or UnsupportedModel as `read_config`."""
        base, engine, asked = read_config(config.model.path), config.engine, config.training
        given = {flags.plain(flag): value for flag, value in engine.extra_args.items()}
        width = ITEMSIZE[engine.dtype]
        weights, unpacked = base_bytes(config.model.path, width)
        adapters = config.slots * width * lora_elements(base, engine.max_lora_rank, engine.target_modules)
        runtime = 0 if device is None else CONTEXT + _runtime(device - CONTEXT, device, given)
        room = CPU_ROOM if device is None else device - runtime - weights - adapters
        sizes = Training(
            engine.max_lora_rank, engine.target_modules, width, asked.micro_batch, asked.seq_len, len(config.adapter),
            on_cpu=device is None,
        )  # fmt: skip
        every = rungs(base, sizes)
        chosen = choose_rung(base, sizes, room)
        training = 0 if chosen is None else chosen.bytes
        if asked.memory_mb is not None:
            training = asked.memory_mb * MIB
            chosen = next((rung for rung in every if rung.bytes <= training), None)
        return cls(
            device=device, weights=weights, saved=unpacked - weights, adapters=adapters, runtime=runtime,
            training=training, parked=parked_bytes(base, sizes), rows=chosen.rows if chosen else None,
            recompute=chosen is not None and chosen.recompute,
            least=min(rung.bytes for rung in every), room=room, kv_bytes_per_token=kv_bytes_per_token(base, width),
            most_kv_tokens=given.get("max_total_tokens", CPU_TOKENS if device is None else None),
        )  # fmt: skip

    @property
    def kv_tokens(self) -> int:
        """Return the tokens that the KV cache holds beside training."""
        tokens = max(0, self.room - self.training) // self.kv_bytes_per_token
        return tokens if self.most_kv_tokens is None else min(tokens, self.most_kv_tokens)

    def told(self) -> str:
        """Say in one line what takes how much."""
        parts = {"base": self.weights, "adapters": self.adapters, "SGLang and CUDA": self.runtime}
        parts = {**parts, "training": self.training, "KV cache": self.kv_tokens * self.kv_bytes_per_token}
        listed = ", ".join(f"{what} {_size(size)}" for what, size in parts.items() if size)
        how = "no micro-batch fits"
        if self.rows is not None:
            how = f"micro-batches of {self.rows}, activations {'computed again' if self.recompute else 'kept'}"
        where = "on a CPU" if self.device is None else f"of {_size(self.device)}"
        parked = f" ({_size(self.parked)} of training for adapters that wait their turn)" if self.parked else ""
        packed = ""
        if self.saved:
            tokens = self.saved // self.kv_bytes_per_token
            packed = f"; the base is packed, which saves {_size(self.saved)}, as much as {tokens:,} tokens of KV cache"
        return f"memory {where}: {listed}: {self.kv_tokens:,} tokens, {how}{parked}{packed}"

    def mistake(self) -> str | None:
        """Say what does not fit and what to do; None where all does."""
        remedy = "lower SGLang's own part ([engine.extra_args] mem_fraction_static, chunked_prefill_size)"
        if self.room <= 0:
            pack = "" if self.saved else "pack the base in 4 bits (`umbel base pack`), or "
            return f"base and SGLang take {_size(-self.room)} more than the device has; {pack}{remedy}"
        if self.rows is None:
            return (
                f"training needs at least {_size(self.least)}, and gets {_size(self.training)} of the "
                f"{_size(self.room)} that are left; {remedy}, [training].seq_len or [engine].max_lora_rank, or set "
                f"[training].memory_mb, which may be more than the {SHARE:.0%} that are the limit without it"
            )
        if self.kv_tokens == 0:
            return f"[training].memory_mb leaves nothing of {_size(self.room)} to the KV cache; lower it"
        return None


def memory_plan(config: SiteConfig) -> MemoryPlan | None:
    """Return the plan for the device of this machine that SGLang would take; None if its size cannot be told."""
    if on_cpu(config.engine.device):
        return MemoryPlan.of(config, None)
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return None
    query = [smi, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    listed = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.split()
    return MemoryPlan.of(config, int(listed[0]) * MIB) if listed and listed[0].isdecimal() else None


def _size(bytes_: int) -> str:
    return f"{bytes_ / GB:.1f} GB" if bytes_ >= GB else f"{bytes_ / 10**6:.0f} MB"


def _runtime(free: int, device: int, given: Mapping[str, Any]) -> int:
    """Return what SGLang keeps for itself of a device of which so much is `free` before the base is loaded."""
    fraction = given.get("mem_fraction_static")
    if fraction is None:
        chunk, graphs = next(((c, g) for gib, c, g in SIZES if device < gib << 30), LARGEST)
        chunk = int(given.get("chunked_prefill_size", chunk))
        captured = len([size for size in (*CAPTURED, *range(4608, chunk + 1, 512)) if size <= chunk])
        kept = MIB * (512 + 128 + max(chunk, 2048) * 3 // 2 + 2 * graphs + 8 * captured)
        fraction = 1 - max(kept, (10 << 30) if device > 60 << 30 else 0) / device
    return int(free * (1 - float(fraction)))
