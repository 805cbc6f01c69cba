"""Adapters as bytes and as PEFT directories, in one canonical form, without torch.

Canonical means: one uniform rank `r`, the scaling folded in so that `lora_alpha == r`, no rsLoRA, DoRA, patterns, bias
or extra modules, every number finite. SGLang ignores anything else or dies of it; peft and SGLang load it as it is.
The dtype is float32 in the registry and on the way, and the engine's where a site loads it. The bytes of
`adapter_model.safetensors` are the adapter: they are sent as they are, and their sha256 is its digest.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
from pydantic import ValidationError

from umbel.adapter import AdapterManifest
from umbel.errors import AdapterError

Array = npt.NDArray[np.generic]
Tensors = dict[str, Array]
"""PEFT key → array: `lora_A` is [r, in], `lora_B` is [out, r]."""
Shapes = Mapping[str, tuple[int, int]]
"""Module path (`model.layers.0.self_attn.q_proj`) → (out, in) of the base's linear layer."""

WEIGHTS, CONFIG, MANIFEST = "adapter_model.safetensors", "adapter_config.json", "manifest.json"
DTYPES: dict[str, npt.DTypeLike] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
"""Name of a dtype in safetensors → the dtype."""
SERVED: dict[str, npt.DTypeLike] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
"""Name of a dtype that engines serve in → the dtype."""
_SCALING = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
_HEADER_BYTES = 1024
"""Most that the header of a safetensors file takes by itself, and for a tensor beside the module's name."""
KEY = re.compile(r"base_model\.model\.(?P<module>[A-Za-z0-9_.]+)\.lora_(?P<factor>[AB])\.weight")


def key(module: str, factor: str) -> str:
    """Return PEFT's key of factor "A" or "B" of a module."""
    return f"base_model.model.{module}.lora_{factor}.weight"


def encode(tensors: Tensors) -> bytes:
    """Encode tensors as safetensors bytes; equal tensors give equal bytes."""
    ordered = {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}
    return safetensors.numpy.save(ordered, {"format": "pt"})


def decode(blob: bytes) -> Tensors:
    """Decode safetensors bytes; raise AdapterError for anything else, before memory is spent on it."""
    try:
        entries: list[tuple[str, Any]] = cast(Any, safetensors).deserialize(blob)
    except safetensors.SafetensorError as error:
        raise AdapterError(f"adapter: not a safetensors file ({error})") from error
    _require_distinct(blob)
    tensors: Tensors = {}
    for name, entry in entries:
        if entry["dtype"] not in DTYPES:
            raise AdapterError(f"adapter: {name} is {entry['dtype']}; expected one of {', '.join(DTYPES)}")
        tensors[name] = np.frombuffer(entry["data"], dtype=DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def _require_distinct(blob: bytes) -> None:
    """Raise AdapterError for a name that is in the header twice: SGLang might read another tensor than this module."""

    def pairs(fields: list[tuple[str, object]]) -> None:
        known: set[str] = set()
        for name, _ in fields:
            if name in known:
                raise AdapterError(f"adapter: {name[:200]} is in its header twice; write it again with safetensors")
            known.add(name)

    json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")], object_pairs_hook=pairs)


def most_bytes(shapes: Shapes, rank: int) -> int:
    """Return a bound for the size of an adapter of these modules as safetensors: float32, and room for its header."""
    weights = sum(4 * rank * (out_features + in_features) for out_features, in_features in shapes.values())
    return weights + _HEADER_BYTES + sum(2 * (_HEADER_BYTES + len(module)) for module in shapes)


def digest(blob: bytes) -> str:
    """Return the sha256 of an adapter's bytes: its identity."""
    return hashlib.sha256(blob).hexdigest()


def factors(tensors: Tensors) -> dict[str, tuple[Array, Array]]:
    """Return module path → (A [r, in], B [out, r]); raise AdapterError for any other key, or a lone factor."""
    found: dict[str, dict[str, Array]] = {}
    for name, array in tensors.items():
        match = KEY.fullmatch(name)
        if match is None:
            raise AdapterError(f"adapter: {name} is not a LoRA factor (expected …lora_A.weight or …lora_B.weight)")
        found.setdefault(match["module"], {})[match["factor"]] = array
    for module, pair in found.items():
        if len(pair) != 2:
            raise AdapterError(f"adapter: {module} has only lora_{next(iter(pair))}; both factors are needed")
    return {module: (found[module]["A"], found[module]["B"]) for module in sorted(found)}


def rank_of(tensors: Tensors) -> int:
    """Return the rank of an adapter's first module; raise AdapterError when it has none."""
    for a, _ in factors(tensors).values():
        return int(a.shape[0])
    raise AdapterError("adapter: it has no factors")


def untrained(
    module: str, shape: tuple[int, int], rank: int, dtype: npt.DTypeLike, generator: np.random.Generator
) -> Tensors:
    """Return new factors of a module of `shape` (out, in) as peft makes them: A Kaiming-uniform (a = √5), B zero.

    With a = √5, A [r, in] is uniform within ±1/√in.
    """
    out_features, in_features = shape
    bound = 1 / np.sqrt(in_features)
    a = generator.uniform(-bound, bound, (rank, in_features))
    return {key(module, "A"): a.astype(dtype), key(module, "B"): np.zeros((out_features, rank), dtype)}


def rounded(tensors: Tensors, dtype: str) -> Tensors:
    """Return an adapter in the dtype that an engine serves in; a number that is too large for it becomes infinity."""
    with np.errstate(over="ignore"):
        return {name: array.astype(SERVED[dtype]) for name, array in tensors.items()}


def validate(tensors: Tensors, shapes: Shapes, *, rank: int, max_rank: int) -> None:
    """Raise AdapterError unless `tensors` is a canonical adapter of exactly these modules and this rank.

    SGLang checks no shape at load and dies at the first request, so this runs before any engine sees the adapter.
    """
    if not 1 <= rank <= max_rank:
        raise AdapterError(
            f"adapter: rank {rank} is not within 1..{max_rank}, the engine's; raise [engine].max_lora_rank at every "
            "site and restart, or lower the rank of the run"
        )
    pairs = factors(tensors)
    _require_modules(pairs, shapes)
    for module, (a, b) in pairs.items():
        out_features, in_features = shapes[module]
        for factor, array, expected in (("A", a, (rank, in_features)), ("B", b, (out_features, rank))):
            if array.shape != expected:
                raise AdapterError(
                    f"adapter: {module}.lora_{factor} has shape {list(array.shape)}, the base needs {list(expected)}"
                )
            if not np.isfinite(array.astype(np.float32)).all():
                raise AdapterError(f"adapter: {module}.lora_{factor} holds NaN or infinity")


def _require_modules(pairs: Mapping[str, object], shapes: Shapes) -> None:
    missing, unknown = sorted(shapes.keys() - pairs.keys()), sorted(pairs.keys() - shapes.keys())
    if missing or unknown:
        what = f"lacks {missing[0]}" if missing else f"has {unknown[0]}, which is not adapted here"
        more = len(missing) + len(unknown) - 1
        raise AdapterError(f"adapter: {what}" + (f" (and {more} more modules differ)" if more else ""))


def peft_config(*, rank: int, target_modules: tuple[str, ...], base: str) -> dict[str, object]:
    """Return the `adapter_config.json` of a canonical adapter."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": sorted(target_modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
    }


def write(directory: Path, blob: bytes, manifest: AdapterManifest, *, base: str) -> None:
    """Write a PEFT directory that is there whole or not at all; `base` becomes `base_model_name_or_path`.

    Writing the same version again changes nothing. Raises AdapterError when the directory holds another adapter.
    """
    if directory.exists():
        if read(directory)[1].digest != manifest.digest:
            raise AdapterError(f"{directory}: {manifest.ref} already exists with other weights; versions are immutable")
        return
    place(directory, {WEIGHTS: blob, CONFIG: encode_config(manifest, base), MANIFEST: encode_manifest(manifest)})


def encode_config(manifest: AdapterManifest, base: str) -> bytes:
    """Return the bytes of a version's `adapter_config.json`."""
    return encode_settings(rank=manifest.rank, target_modules=manifest.target_modules, base=base)


def encode_settings(*, rank: int, target_modules: tuple[str, ...], base: str) -> bytes:
    """Return `peft_config` as the bytes of an `adapter_config.json`."""
    return json.dumps(peft_config(rank=rank, target_modules=target_modules, base=base), indent=2).encode()


def encode_manifest(manifest: AdapterManifest) -> bytes:
    """Return the bytes of a version's `manifest.json`."""
    return manifest.model_dump_json(indent=2).encode()


def place(directory: Path, files: Mapping[str, bytes | Path]) -> None:
    """Make a directory, whole or not at all, of file name → content, or → target of a symbolic link (a Path)."""
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, content in files.items():
        if isinstance(content, Path):
            (temporary / name).symlink_to(content)
        else:
            write_durably(temporary / name, content)
    sync_directory(temporary)
    os.rename(temporary, directory)
    sync_directory(directory.parent)


def read(directory: Path) -> tuple[bytes, AdapterManifest]:
    """Read a version; raise AdapterError when a file is missing, or weights or scaling are not the manifest's."""
    try:
        blob, manifest = (directory / WEIGHTS).read_bytes(), (directory / MANIFEST).read_bytes()
        config = (directory / CONFIG).read_bytes()
        parsed = AdapterManifest.model_validate_json(manifest)
    except OSError as error:
        raise AdapterError(f"{directory}: not an adapter version ({error.strerror}: {error.filename})") from error
    except ValidationError as error:
        raise AdapterError(f"{directory / MANIFEST}: not a manifest; the file was changed or damaged") from error
    if digest(blob) != parsed.digest:
        raise AdapterError(f"{directory / WEIGHTS}: its sha256 is not the manifest's; the file was changed or damaged")
    _require_scaling(directory / CONFIG, config, parsed)
    return blob, parsed


def _require_scaling(path: Path, config: bytes, manifest: AdapterManifest) -> None:
    """Raise AdapterError unless the settings scale the weights canonically: the digest covers the weights only."""
    try:
        settings = json.loads(config)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: not JSON; the file was changed or damaged") from error
    wanted = peft_config(rank=manifest.rank, target_modules=manifest.target_modules, base="")
    for key in _SCALING:
        if not isinstance(settings, dict) or settings.get(key) != wanted[key]:
            raise AdapterError(f"{path}: {key} is not {wanted[key]!r}; the file was changed or damaged")


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_durably(path: Path, content: bytes) -> None:
    """Replace a file by atomic rename: a reader, or a crash, sees the old content or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    write_durably(temporary, content)
    os.replace(temporary, path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Have the names of a directory's files on disk before returning."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
