"""`pack`: make a base in 4 bits of one in 16 or 32 bits, a directory that SGLang, transformers and umbel load.

Packing is not portable: another release of bitsandbytes or another kind of device may round a scale to other bytes. So
a base is packed once, and the directory is copied to every site.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch

from serving.four_bit.library import bitsandbytes
from serving.four_bit.weight import FourBitWeight
from umbel import signing
from umbel.base.config import config_mistakes
from umbel.base.files import INDEX, file_mistakes, weight_files
from umbel.base.fingerprint import BaseFingerprint
from umbel.base.origin import ORIGIN, BaseOrigin
from umbel.base.packed import METHOD, RELEASE, packing_of
from umbel.base.shapes import LINEARS, linear_shapes, read_config, weight_shapes
from umbel.errors import ConfigError, UnsupportedModel
from umbel.peft_dir import replace_durably, write_durably

LARGEST_ERROR = 0.2
"""Largest ‖W - unpacked W‖ / ‖W‖ of a layer (Frobenius); of normal weights it is 0.09 in nf4."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", INDEX)
"""Endings of files that are not copied: weights of the base that is packed."""

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Packed:
    """Sizes and exactness of a base that was packed."""

    before: int
    """Bytes of the weights' files of the base that was packed."""
    after: int
    errors: dict[str, float]
    """Linear layer → ‖W - unpacked W‖ / ‖W‖ (Frobenius), measured on the files as they were written."""

    @property
    def mean_error(self) -> float:
        return sum(self.errors.values()) / len(self.errors)


def pack(
    model: Path, out: Path, *, quant_type: Literal["nf4", "fp4"] = "nf4", key: signing.PrivateKey | None = None,
    tell: Tell = print,
) -> Packed:  # fmt: skip
    """Pack the linear layers of the base in `model` into the new directory `out`, which is there whole or not at all.

    Scales are packed, too ("double quantisation"). `key` signs where the packed base comes from. Raises ConfigError or
    UnsupportedModel for a base that cannot be served or is packed already, and where `out` is there.

    >>> pack(Path("base"), Path("base-nf4")).mean_error
    """
    if out.exists():
        raise ConfigError(f"{out} is there already; name a new directory")
    config = read_config(model)
    if packing_of(config):
        raise ConfigError(f"{model}: packed already ({packing_of(config)}); give the base that it was made of")
    for mistake in [*config_mistakes(model, config), *file_mistakes(model, weight_shapes(model))]:
        raise mistake
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        packed = _write(model, temporary, config, quant_type, tell)
        _write_origin(model, temporary, quant_type)
        if key is not None:
            sign_origin(temporary, key)
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return packed


def _write(model: Path, into: Path, config: dict[str, Any], quant_type: str, tell: Tell) -> Packed:
    """Write all of the packed base but its origin."""
    linears = {f"{module}.weight" for module in linear_shapes(model, LINEARS)}
    shards = weight_files(model)
    held: dict[str, str] = {}
    errors: dict[str, float] = {}
    for number, shard in enumerate(shards, start=1):
        tell(f"packing {shard.name} ({number} of {len(shards)})")
        names = _write_shard(shard, into / shard.name, linears, quant_type)
        errors |= _errors(shard, into / shard.name, linears)
        held |= dict.fromkeys(names, shard.name)
    after = sum((into / shard.name).stat().st_size for shard in shards)
    if len(shards) > 1 or (model / INDEX).is_file():
        index = {"metadata": {"total_size": after}, "weight_map": dict(sorted(held.items()))}
        write_durably(into / INDEX, json.dumps(index, indent=2).encode())
    recipe = {
        "quant_method": METHOD, "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_compute_dtype": config.get("dtype") or config.get("torch_dtype") or "bfloat16",
    }  # fmt: skip
    write_durably(into / "config.json", json.dumps({**config, "quantization_config": recipe}, indent=2).encode())
    for file in sorted(model.iterdir()):
        if file.is_file() and file.name != "config.json" and not file.name.endswith(WEIGHTS):
            shutil.copyfile(file, into / file.name)
    return Packed(sum(shard.stat().st_size for shard in shards), after, errors)


def _write_shard(shard: Path, into: Path, linears: set[str], quant_type: str) -> list[str]:
    """Pack the linear layers of one file; return the names of the tensors that were written."""
    tensors: dict[str, torch.Tensor] = {}
    with safetensors.safe_open(shard, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is no dict
            tensor = file.get_tensor(name)
            if name not in linears:
                tensors[name] = tensor
                continue
            values = tensor.float() if tensor.dtype == torch.float64 else tensor
            packed, state = bitsandbytes().functional.quantize_4bit(
                values.contiguous(), compress_statistics=True, quant_type=quant_type
            )
            tensors[name] = packed
            tensors |= {f"{name}.{part}": value for part, value in state.as_dict(packed=True).items()}
    safetensors.torch.save_file(tensors, into, metadata={"format": "pt"})
    with into.open("rb") as written:
        os.fsync(written.fileno())
    return list(tensors)


def _errors(shard: Path, packed: Path, linears: set[str]) -> dict[str, float]:
    """Unpack what was written; return the error of each layer. Raises UnsupportedModel for one that is too large."""
    errors: dict[str, float] = {}
    with safetensors.safe_open(shard, framework="pt") as before, safetensors.safe_open(packed, framework="pt") as after:
        names = set(after.keys())
        for name in sorted(linears & names):
            scales = [part for part in names if part.startswith(f"{name}.")]
            parts = {part.removeprefix(f"{name}."): after.get_tensor(part) for part in scales}
            state = bitsandbytes().functional.QuantState.from_dict(parts, device="cpu")
            exact = before.get_tensor(name).float()
            difference = FourBitWeight(after.get_tensor(name), state).unpacked(torch.float32) - exact
            errors[name] = float(difference.norm() / exact.norm().clamp(min=torch.finfo(torch.float32).tiny))
            if not errors[name] <= LARGEST_ERROR:
                raise UnsupportedModel(
                    f"{shard}: {name} in 4 bits is off by {errors[name]:.0%} of its norm, at most {LARGEST_ERROR:.0%} "
                    "is usual; serve this base unpacked"
                )
    return errors


def sign_origin(packed: Path, key: signing.PrivateKey) -> None:
    """Sign where a packed base comes from, in its `origin.json`; the base itself stays as it is."""
    origin = BaseOrigin.read(packed, BaseFingerprint.of(packed))
    if origin is None:
        raise ConfigError(f"{packed}: no {ORIGIN} here; pack the base again with `umbel base pack`")
    signed = origin.model_copy(update={"signature": signing.sign(key, origin)})
    replace_durably(packed / ORIGIN, signed.model_dump_json(indent=2).encode())


def _write_origin(model: Path, packed: Path, quant_type: str) -> None:
    origin = BaseOrigin(
        base=BaseFingerprint.of(model),
        packed=BaseFingerprint.of(packed),
        recipe={"quant_type": quant_type, "double_quant": True},
        bitsandbytes=RELEASE,
    )
    write_durably(packed / ORIGIN, origin.model_dump_json(indent=2).encode())
