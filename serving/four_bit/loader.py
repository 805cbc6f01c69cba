"""`FourBitLoader`: loads a base that bitsandbytes packed, on any device."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from sglang.srt.model_loader.loader import BitsAndBytesModelLoader
from sglang.srt.model_loader.utils import set_default_torch_dtype

from serving.four_bit.library import bitsandbytes
from serving.four_bit.weight import FourBitWeight
from umbel.base.files import weight_files


class FourBitLoader(BitsAndBytesModelLoader):
    """SGLang's loader of bitsandbytes, which would put scales on "cuda" only, and round their offset to 16 bits."""

    def _prepare_weights(self, model_name_or_path: str, revision: str | None) -> tuple[list[str], bool]:
        """Return the files that the base's fingerprint counts; SGLang would take every *.safetensors beside them."""
        return [str(file) for file in weight_files(Path(model_name_or_path))], True

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
                of_weight = parts.pop(name)
                kind = next((part.partition("__")[2] for part in of_weight if "bitsandbytes__" in part), "")
                # The scales' offset is a plain number there, which becomes a tensor of the default dtype.
                with set_default_torch_dtype(torch.float32):
                    states[name] = bitsandbytes().functional.QuantState.from_dict(of_weight, device=device)
                FourBitWeight(tensor, states[name]).require_whole(name, kind)
            yield name, tensor

    def _unquantized_generator(self, *_: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """Refuse to pack while loading: the fingerprint is of the files, and would not be of what is served."""
        raise ValueError("this base is not packed; `umbel base pack` packs one")
