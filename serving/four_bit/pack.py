"""`pack`: make a base in 4 bits of one in 16 or 32 bits, a directory that SGLang, transformers and umbel load.

Packing is not portable: another release of bitsandbytes or another kind of device may round a scale to other bytes. So
a base is packed once, and the directory is copied to every site.
"""

import importlib.metadata
import importlib.util
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import psutil
import safetensors
import safetensors.torch
import torch

from serving.four_bit.library import bitsandbytes
from serving.four_bit.weight import FourBitWeight
from umbel import signing
from umbel.base.config import config_mistakes
from umbel.base.files import INDEX, file_mistakes, tokenizer_mistakes, weight_files
from umbel.base.fingerprint import BaseFingerprint
from umbel.base.origin import ORIGIN, BaseOrigin
from umbel.base.packed import METHOD, MISSING_TO_PACK, is_served, packing_of
from umbel.base.shapes import LINEARS, linear_shapes, read_config, weight_shapes
from umbel.errors import ConfigError, NoRoom, UmbelError, UnsupportedModel
from umbel.peft_dir import replace_durably, sync_directory, write_durably

LARGEST_ERROR = 0.2
"""Largest ‖W - unpacked W‖ / ‖W‖ of a layer (Frobenius); of normal weights it is 0.09 in nf4."""
COPIED = (".json", ".jinja", ".model", ".txt", ".md")
"""Endings of the files that go with a base: tokenizer, template, sampling, model card and licence."""

Tell = Callable[[str], None]


def pack(
    model: Path, out: Path, *, quant_type: Literal["nf4", "fp4"] = "nf4", key: signing.PrivateKey | None = None,
    tell: Tell = print,
) -> dict[str, float]:  # fmt: skip
    """Pack the linear layers of the base in `model` into the new directory `out`, which is there whole or not at all.

    Scales are packed, too ("double quantisation"). `key` signs where the packed base comes from. Returns linear layer →
    ‖W - unpacked W‖ / ‖W‖ (Frobenius), measured on the files as written. Raises ConfigError or UnsupportedModel for a
    base that cannot be served or is packed already, and where `out` is there; NoRoom where the disk is full.

    >>> errors = pack(Path("base"), Path("base-nf4"))
    >>> sum(errors.values()) / len(errors)  # about 0.09
    """
    config = read_config(model)
    for mistake in _mistakes(model, out, config):
        raise mistake
    for left in out.parent.glob(f".{out.name}.*.tmp"):  # of a process that was killed while it packed
        if not psutil.pid_exists(int(left.suffixes[-2][1:])):
            shutil.rmtree(left)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        errors = _write(model, temporary, config, quant_type, tell)
        _write_origin(model, temporary, quant_type)
        if key is not None:
            sign_origin(temporary, key)
        sync_directory(temporary)
        os.rename(temporary, out)
        sync_directory(out.parent)
    except safetensors.SafetensorError as error:
        raise NoRoom(f"{out}: the packed weights cannot be written ({error}); make room there") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return errors


def _mistakes(model: Path, out: Path, config: dict[str, Any]) -> Iterator[UmbelError]:
    """Yield why a base cannot be packed into `out`."""
    above = next(path for path in out.absolute().parents if path.exists())
    if out.exists() or out.is_symlink():
        yield ConfigError(f"{out} is there already; name a new directory")
    if not above.is_dir():
        yield ConfigError(f"{out}: {above} is a file; name a directory that can be made")
    if model.resolve() in out.resolve().parents:
        yield ConfigError(f"{out} is inside the base that is packed; name a directory beside it")
    if importlib.util.find_spec(METHOD) is None:
        yield ConfigError(MISSING_TO_PACK)
    yield from config_mistakes(model, config)
    yield from tokenizer_mistakes(model)
    yield from file_mistakes(model, weight_shapes(model) if is_served(config) else {})
    if packing_of(config):
        yield ConfigError(f"{model}: packed already ({packing_of(config)}); give the base that it was made of")


def _write(model: Path, into: Path, config: dict[str, Any], quant_type: str, tell: Tell) -> dict[str, float]:
    """Write all of the packed base but its origin; return the error of each layer."""
    linears = {f"{module}.weight" for module in linear_shapes(model, LINEARS)}
    shards = weight_files(model)
    held: dict[str, str] = {}
    errors: dict[str, float] = {}
    for number, shard in enumerate(shards, start=1):
        tell(f"packing {shard.name} ({number} of {len(shards)})")
        names = _write_shard(shard, into / shard.name, linears, quant_type)
        errors |= _errors(shard, into / shard.name, linears)
        held |= dict.fromkeys(names, shard.name)
    size = sum((into / shard.name).stat().st_size for shard in shards)
    if len(shards) > 1 or (model / INDEX).is_file():
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(held.items()))}
        write_durably(into / INDEX, json.dumps(index, indent=2).encode())
    recipe = {
        "quant_method": METHOD, "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_compute_dtype": config.get("dtype") or config.get("torch_dtype") or "bfloat16",
    }  # fmt: skip
    write_durably(into / "config.json", json.dumps({**config, "quantization_config": recipe}, indent=2).encode())
    for file in sorted(model.iterdir()):
        if file.is_file() and file.name not in ("config.json", INDEX) and file.suffix in COPIED:
            write_durably(into / file.name, file.read_bytes())
    return errors


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
    into.chmod(shard.stat().st_mode)  # safetensors writes for the owner only
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
            if not math.isfinite(errors[name]):
                raise UnsupportedModel(f"{shard}: {name} has a NaN or an infinity; copy the base again")
            if errors[name] > LARGEST_ERROR:
                raise UnsupportedModel(
                    f"{shard}: {name} in 4 bits is off by {errors[name]:.0%} of its norm, at most {LARGEST_ERROR:.0%} "
                    "is usual; serve this base unpacked"
                )
    return errors


def sign_origin(packed: Path, key: signing.PrivateKey) -> None:
    """Sign where a packed base comes from, in its `origin.json`; the base itself stays as it is, and is not read."""
    origin = BaseOrigin.parse(packed)
    if origin is None:
        raise ConfigError(f"{packed}: no {ORIGIN} here; pack the base again with `umbel base pack`")
    signed = origin.model_copy(update={"signature": signing.sign(key, origin)})
    replace_durably(packed / ORIGIN, signed.model_dump_json(indent=2).encode())


def _write_origin(model: Path, packed: Path, quant_type: str) -> None:
    origin = BaseOrigin(
        base=BaseFingerprint.of(model),
        packed=BaseFingerprint.of(packed),
        recipe={"quant_type": quant_type, "double_quant": True},
        bitsandbytes=importlib.metadata.version(METHOD),
    )
    write_durably(packed / ORIGIN, origin.model_dump_json(indent=2).encode())
