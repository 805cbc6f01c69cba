"""`FourBitWeight`: a weight as bitsandbytes packs it in 4 bits, and products that unpack a run of its rows at a time.

Of a weight W [N, K] there are N · K / 2 bytes, with a code of two values in each, and a scale for every block of 64
values along the flat W. With "double quantisation" the scales are packed, too, in 8 bits (QLoRA, arXiv 2305.14314):

    W[n, k] = code[q] · s_b,    s_b = code₂[a_b] · t_⌊b/256⌋ + o

All of these tensors are the engine's own; nothing here copies one. Unpacked is at most a run of rows: on a CPU some
million values, which stay in its cache, where a whole matrix would be written to fresh pages of memory first.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F

from serving.four_bit.library import bitsandbytes
from umbel.base.packed import BLOCK, NESTED_BLOCK
from umbel.errors import UnsupportedModel

STATES = "bnb_quant_state"
"""Attribute of SGLang's packed parameters: shard → bitsandbytes' QuantState of it."""
OFFSETS = "bnb_shard_offsets"
"""Attribute of SGLang's packed parameters: where each shard's bytes begin, and where the last one's end."""
RUN = 1 << 20
"""Values that are unpacked at a time on a CPU."""


@dataclass(frozen=True)
class FourBitWeight:
    """W [N, K], frozen, in 4 bits."""

    packed: torch.Tensor
    """Two values in each byte: [N · K / 2, 1] or [N · K / 2], uint8."""
    state: Any
    """bitsandbytes' QuantState: shape, block size, scales and codes."""

    @classmethod
    def shard(cls, parameter: torch.Tensor, number: int) -> Self:
        """Return a part of a parameter of SGLang's, which has the bytes of fused layers one after the other."""
        offsets = getattr(parameter, OFFSETS)
        # By number, never in the order of the states: they come in the order of the base's file (k, q, v).
        packed = parameter.detach()[int(offsets[number]) : int(offsets[number + 1])]
        return cls(packed, getattr(parameter, STATES)[number])

    @classmethod
    def shards(cls, parameter: torch.Tensor) -> Iterator[Self]:
        """Yield all parts of a parameter of SGLang's, in the order of its output; none of one that is not in 4 bits."""
        for number in range(len(getattr(parameter, STATES, ()))):
            yield cls.shard(parameter, number)

    @property
    def shape(self) -> tuple[int, int]:
        """Return (N, K)."""
        n, k = self.state.shape
        return int(n), int(k)

    @property
    def scale_tensors(self) -> dict[str, torch.Tensor]:
        """Return what lies in memory for it beside the bytes: scales and codes, and where scales are packed, theirs."""
        state = self.state
        own = {"scales": state.absmax, "code": state.code}
        if state.state2 is None:
            return own
        return own | {"offset": state.offset, "scales2": state.state2.absmax, "code2": state.state2.code}

    def require_whole(self, name: str, kind: str) -> None:
        """Raise UnsupportedModel unless bytes and scales belong together, in blocks of 64 values of this kind.

        The kernels trust a state, and would read past its scales.
        """
        state, values = self.state, math.prod(self.state.shape)
        blocks = -(-values // BLOCK)
        nested = state.state2 is None or state.state2.absmax.numel() == -(-blocks // NESTED_BLOCK)
        sizes = (self.packed.numel(), state.absmax.numel(), state.blocksize)
        if sizes != (-(-values // 2), blocks, BLOCK) or state.quant_type != kind or not nested:
            raise UnsupportedModel(
                f"{name}: {sizes[0]} bytes and {sizes[1]} scales of {state.quant_type} in blocks of {state.blocksize} "
                f"are no weight {list(state.shape)} of {kind}; copy the packed directory again"
            )

    def scales(self) -> torch.Tensor:
        """Return the scale of each block of values, in fp32: [⌈N · K / block size⌉]."""
        scales: torch.Tensor = self.state.absmax
        if self.state.state2 is not None:
            scales = bitsandbytes().functional.dequantize_blockwise(scales, self.state.state2) + self.state.offset
        return scales.float()

    def runs(self) -> list[slice]:
        """Return the rows in runs of at most `RUN` values, each beginning where a block does; one run on a GPU."""
        n, k = self.shape
        if self.packed.device.type != "cpu":
            return [slice(0, n)]
        whole_blocks = self.state.blocksize // math.gcd(k, self.state.blocksize)
        rows = max(whole_blocks, RUN // k // whole_blocks * whole_blocks)
        return [slice(at, min(at + rows, n)) for at in range(0, n, rows)]

    def unpacked(
        self, dtype: torch.dtype, rows: slice | None = None, scales: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return W [N, K], or one of its `runs`, in `dtype`; `scales` where they are known already."""
        n, k = self.shape
        block = self.state.blocksize
        first, last, _ = (rows or slice(None)).indices(n)
        begin, end = first * k, last * k
        # The kernel for AVX-512 reads the wrong scales where the block size does not divide a row. So a row is a block
        # here, or, where the last block is not whole, everything is one row.
        shape = [(end - begin) // block, block] if (end - begin) % block == 0 else [1, end - begin]
        values: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
            self.packed[begin // 2 : -(end // -2)],
            (self.scales() if scales is None else scales)[begin // block : -(end // -block)],
            block,
            self.state.quant_type,
            shape,
            dtype,
        )
        return values.view(last - first, k)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Return x Wᵀ [.., N] for x [.., K]: the very numbers of a product with all of W."""
        runs = self.runs()
        if len(runs) == 1:
            return F.linear(x, self.unpacked(x.dtype))
        scales, y = self.scales(), x.new_empty(*x.shape[:-1], self.shape[0])
        for rows in runs:
            y[..., rows] = F.linear(x, self.unpacked(x.dtype, rows, scales))
        return y

    def input_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return ∂L/∂x = ∂L/∂y · W [.., K] for ∂L/∂y [.., N], summed over runs of rows in fp32."""
        runs = self.runs()
        if len(runs) == 1:
            return gradient @ self.unpacked(gradient.dtype)
        total = gradient.new_zeros(*gradient.shape[:-1], self.shape[1], dtype=torch.float32)
        scales = self.scales()
        for rows in runs:
            total += gradient[..., rows] @ self.unpacked(gradient.dtype, rows, scales)
        return total.to(gradient.dtype)
