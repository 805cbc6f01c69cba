"""`PortableCpuPlatform`: runs stock SGLang on any CPU in plain PyTorch, without AMX and without `sgl_kernel`.

`activate` is an entry point of SGLang's group `sglang.srt.platforms`. An activated platform wins over every built-in
one, so `activate` steps aside if there is an accelerator or if SGLang's own CPU engine is asked for.
"""

import functools
import gc
import os
from collections.abc import Callable
from typing import Any

import psutil
import torch
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform
from torch.utils._device import _device_constructors

from umbel.base.packed import METHOD


def activate() -> str | None:
    """Return the name of the platform's class, or None if there is an accelerator or SGLang's own CPU engine is wanted.

    As a side effect, torch ignores requests to pin memory from then on.
    """
    if torch.accelerator.is_available() or os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
        return None
    _ignore_pinning()
    return "serving.cpu_platform.PortableCpuPlatform"


class PortableCpuPlatform(SRTPlatform):
    """SGLang's view of a device, for the CPU and main memory (bytes)."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"

    def get_device_total_memory(self, device_id: int = 0) -> int:
        return int(psutil.virtual_memory().total)

    def get_current_memory_usage(self, device: torch.device | None = None) -> float:
        memory = psutil.virtual_memory()
        return float(memory.total - memory.available)

    def get_available_memory(self, device_id: int = 0) -> tuple[int, int]:
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    def get_device(self, device_id: int = 0) -> str:
        return "cpu"

    def set_device(self, device: torch.device) -> None:
        pass

    def get_device_name(self, device_id: int = 0) -> str:
        return "cpu"

    def get_device_uuid(self, device_id: int = 0) -> str:
        return "cpu"

    def empty_cache(self) -> None:
        gc.collect()

    def synchronize(self) -> None:
        pass

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_quantization_config(self, quantization: str) -> type | None:
        if quantization != METHOD:
            return None
        from serving.four_bit.method import FourBitConfig

        return FourBitConfig


def _ignore_pinning() -> None:
    # SGLang's LoRA layers pin host memory unconditionally (sglang#31894), which torch refuses without an accelerator.
    # `with torch.device(...)` knows these functions by identity, from a list that torch makes when it first needs it:
    # made of the wrapped ones it would match no call, and `transformers` would load models with uninitialised buffers.
    _device_constructors()
    for name in ("tensor", "empty", "zeros", "ones", "arange", "full", "empty_like"):
        setattr(torch, name, _without_pinning(getattr(torch, name)))
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def _without_pinning(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)

    return wrapper
