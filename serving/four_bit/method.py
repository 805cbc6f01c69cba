"""`FourBitConfig`: how SGLang multiplies by weights in 4 bits where its own operator is not available, as on a CPU."""

from typing import Any

import torch
from sglang.srt.layers.quantization.bitsandbytes import BitsAndBytesConfig, BitsAndBytesLinearMethod

from serving.four_bit.library import bitsandbytes
from serving.four_bit.weight import FourBitWeight


class FourBitMethod(BitsAndBytesLinearMethod):
    """Products with bitsandbytes' bytes in the number format of the input, in plain PyTorch.

    SGLang's own method multiplies by an operator that only CUDA has, and in bfloat16, whatever the base computes in.
    """

    def create_weights(self, layer: torch.nn.Module, *sizes: Any, params_dtype: torch.dtype, **attributes: Any) -> None:
        """Give `layer` room for the bytes: two values in each. SGLang would halve the room of a base in float32."""
        super().create_weights(layer, *sizes, params_dtype=torch.bfloat16, **attributes)

    def _apply_4bit_weight(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        parts = [shard.product(x) for shard in FourBitWeight.shards(layer.get_parameter("weight"))]
        y = torch.cat(parts, dim=-1)
        return y if bias is None else y + bias


class FourBitConfig(BitsAndBytesConfig):
    """SGLang's configuration of bitsandbytes, whose linear layers use `FourBitMethod`."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        bitsandbytes()  # before SGLang imports it in its own way
        super().__init__(*args, **settings)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        method = super().get_quant_method(layer, prefix)
        return FourBitMethod(self) if isinstance(method, BitsAndBytesLinearMethod) else method
