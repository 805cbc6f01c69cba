"""`FourBitLoader`: loads a base that bitsandbytes packed, on any device."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from sglang.srt.model_loader.loader import BitsAndBytesModelLoader
from sglang.srt.model_loader.utils import set_default_torch_dtype

from serving.four_bit.library import bitsandbytes


class FourBitLoader(BitsAndBytesModelLoader):
    """SGLang's loader of bitsandbytes, which would put scales on "cuda" only, and round their offset to 16 bits."""

    def _quantized_4bit_generator(
        self, files: Sequence[str], use_safetensors: bool, states: dict[str, Any]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors of `files`, and put each packed weight's QuantState into `states` before it."""
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in self._hf_weight_iter(files, use_safetensors):
            if self._is_4bit_weight_name(name):
                module, _, part = name.partition(".weight.")
                # A tensor as it is read is a map of its file: whoever writes into the file would change the base.
                parts.setdefault(f"{module}.weight", {})[part] = tensor.clone()
        device = torch.get_default_device()  # SGLang's loader sets the engine's
        for name, tensor in self._hf_weight_iter(files, use_safetensors):
            if self._is_4bit_weight_name(name):
                continue
            if name in parts:
                # The scales' offset is a plain number there, which becomes a tensor of the default dtype.
                with set_default_torch_dtype(torch.float32):
                    states[name] = bitsandbytes().functional.QuantState.from_dict(parts.pop(name), device=device)
            yield name, tensor

    def _unquantized_generator(self, *_: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """Refuse to pack while loading: the fingerprint is of the files, and would not be of what is served."""
        raise ValueError("this base is not packed; `umbel base pack` packs one")
