"""`FourBitLinear`: a linear layer over a weight in 4 bits that the engine holds, forward and backward."""

from typing import Any

import torch

from serving.four_bit.library import bitsandbytes
from serving.four_bit.weight import FourBitWeight


class FourBitLinear(torch.nn.Linear):
    """y = x Wᵀ + b, where W is frozen and exists, a run of rows at a time, only while it is multiplied by.

    It is not bitsandbytes' own `Linear4bit`: on a CPU with AVX512-BF16 that one's first evaluation repacks the bytes
    and rewrites the QuantState, and SGLang, whose bytes and state they are, would read them in the old order.
    """

    def __init__(self, weight: FourBitWeight) -> None:
        torch.nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.four_bit = weight
        self.weight = torch.nn.Parameter(weight.packed, requires_grad=False)
        self.register_parameter("bias", None)

    @classmethod
    def replace(cls, model: torch.nn.Module) -> None:
        """Put one in the place of each of bitsandbytes' own layers in `model`, over the same bytes."""
        for name, module in list(model.named_modules()):
            if isinstance(module, bitsandbytes().nn.Linear4bit):
                layer = cls(FourBitWeight(module.weight.data, module.weight.quant_state))
                layer.bias = module.bias
                model.set_submodule(name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = _Product.apply(x, self.four_bit)
        return y if self.bias is None else y + self.bias


class _Product(torch.autograd.Function):
    """Keeps nothing for the backward pass: an ordinary product would keep every weight that it unpacked."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: FourBitWeight) -> torch.Tensor:
        ctx.weight = weight  # not `save_for_backward`: the engine's tensors may be inference tensors
        return weight.product(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        return (ctx.weight.input_gradient(gradient) if ctx.needs_input_grad[0] else None), None
