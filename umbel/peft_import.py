"""`read`, `look`: take a PEFT LoRA directory that umbel did not write, in umbel's canonical form, or refuse it.

Into the weights are folded: the scaling (alpha / r, with rsLoRA alpha / √r) and patterns of ranks and alphas. What an
adapter does not change gets zero factors, and a module of smaller rank zero rows: SGLang fails on an adapter that has
q without v, or up without gate, and takes one rank for all. The sum `scaling · B A` stays the same, up to
the rounding of `B · scaling`.

Nothing is unpickled, and no more is read than such an adapter can have.
"""

import contextlib
import hashlib
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from umbel import peft_dir
from umbel.base.files import read_header
from umbel.base.shapes import LINEARS
from umbel.errors import AdapterError, ConfigError
from umbel.peft_settings import PeftSettings

PICKLED = "adapter_model.bin"
MOST_CONFIG_BYTES = 1 << 20
METADATA_BYTES = 1 << 20
"""Room for what a header of safetensors may hold beside the tensors."""
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_NOT_PLAIN = {
    r"lora_magnitude_vector": "a magnitude of DoRA; SGLang serves no DoRA: train it as plain LoRA",
    r"embed_tokens|lm_head|lora_embedding": "of an embedding or the head; train it on linear layers of blocks only",
    r"modules_to_save": "a whole module; train it without modules_to_save",
    r"bias$": "a bias; train it with bias = 'none' and lora_bias = false",
    r"lora_[AB]\.[^.]+\.weight$": "saved with the adapter's name in it; save it with peft's save_pretrained",
}
"""Pattern of a tensor's name → what it is, and what to do."""


@dataclass(frozen=True)
class ImportedAdapter:
    """An adapter in canonical form."""

    tensors: peft_dir.Tensors
    """Float32: of every module of the base, A [rank, in] and B [out, rank], to be added as B A."""
    rank: int
    """The largest rank of its modules."""
    source: str
    """sha256 of its two files as they were read."""
    unchanged: tuple[str, ...]
    """Modules that it does not change: their B is zero."""


def read(
    path: Path,
    shapes: peft_dir.Shapes,
    max_rank: int,
    target_modules: tuple[str, ...],
    fill: np.random.Generator | None = None,
) -> ImportedAdapter:
    """Return the adapter in a PEFT directory, for a base of `shapes` whose `target_modules` are adapted.

    With `fill`, a row of A that the adapter does not have is drawn as for a new adapter, so that training can use it;
    its column of B is zero either way. Raises AdapterError, which names the file and what to do.
    """
    config, weights, settings = _checked(path, shapes, max_rank, target_modules)
    blob = _content(weights, path, _most_bytes(shapes, max_rank))
    try:
        tensors = peft_dir.decode(blob)
        entries = {name: (_named(array.dtype), array.shape) for name, array in tensors.items()}
        ranks = _ranks(entries, settings, shapes, max_rank, target_modules)  # it may have changed since its header
        whole = _canonical(peft_dir.factors(tensors), settings, shapes, ranks, fill)
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from error
    source = hashlib.sha256(hashlib.sha256(config).digest() + hashlib.sha256(blob).digest()).hexdigest()
    unchanged = tuple(module for module in shapes if module not in ranks)
    return ImportedAdapter(whole, max(ranks.values()), source, unchanged)


def look(path: Path, shapes: peft_dir.Shapes, max_rank: int, target_modules: tuple[str, ...]) -> int:
    """Check a PEFT directory by its settings and the header of its weights; return its rank. Raises as `read` does."""
    _, weights, settings = _checked(path, shapes, max_rank, target_modules)
    ranks = _ranks(_header(weights, path), settings, shapes, max_rank, target_modules)
    for module in ranks:
        settings.scaling(module)  # its patterns have to come to an end, too
    return max(ranks.values())


def _checked(
    path: Path, shapes: peft_dir.Shapes, max_rank: int, target_modules: tuple[str, ...]
) -> tuple[bytes, Path, PeftSettings]:
    """Return the settings, as bytes and read, and the file of the weights, whose header and size are right."""
    config = _content(_file(path, peft_dir.CONFIG, MOST_CONFIG_BYTES), path, MOST_CONFIG_BYTES)
    try:
        settings = PeftSettings.parse(config)
    except AdapterError as error:
        raise AdapterError(f"{path / peft_dir.CONFIG}: {error}") from error
    if not (path / peft_dir.WEIGHTS).exists() and (path / PICKLED).exists():
        raise AdapterError(
            f"{path}: has only {PICKLED}, a pickle, which can run code when it is read; load it with peft where you "
            "trust it, and save it again with safe_serialization=True"
        )
    weights = _file(path, peft_dir.WEIGHTS)
    try:
        _ranks(_header(weights, path), settings, shapes, max_rank, target_modules)
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from error
    _file(path, peft_dir.WEIGHTS, _most_bytes(shapes, max_rank))
    return config, weights, settings


def _most_bytes(shapes: peft_dir.Shapes, max_rank: int) -> int:
    return peft_dir.most_bytes(shapes, max_rank) + METADATA_BYTES


def _file(path: Path, name: str, most: int | None = None) -> Path:
    """Return a regular file of a directory, of at most `most` bytes; a link may stay within the directory."""
    try:
        file = (path / name).resolve(strict=True)
        found = file.stat()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle; a NUL in the name
        raise AdapterError(
            f"{path / name}: cannot be read ({getattr(error, 'strerror', None) or error}); a PEFT directory has "
            f"{peft_dir.CONFIG} and {peft_dir.WEIGHTS}"
        ) from error
    if not file.is_relative_to(path.resolve()):
        raise AdapterError(f"{path / name}: a link to {file}, outside of it; copy the directory with `cp -rL`")
    if not stat.S_ISREG(found.st_mode):
        raise AdapterError(f"{path / name}: not a file")
    if most is not None and found.st_size > most:
        raise AdapterError(f"{path / name}: has {found.st_size:,} bytes, over {most:,}, the most that it can have here")
    return file


def _content(file: Path, path: Path, most: int) -> bytes:
    """Return the bytes of a file that `_file` has found; no part of the way to it may have become a link since."""
    try:
        root = path.resolve()
        with contextlib.ExitStack() as opened:
            handle = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
            opened.callback(os.close, handle)
            for part in file.relative_to(root).parts:
                handle = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=handle)
                opened.callback(os.close, handle)
            with open(handle, "rb", closefd=False) as whole:
                content = whole.read(min(os.fstat(handle).st_size, most + 1))
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise AdapterError(f"{path}: {file.name} cannot be read ({why}); was it exchanged meanwhile?") from error
    if len(content) > most:
        raise AdapterError(f"{file}: has grown over {most:,} bytes while it was read; copy it again")
    return content


def _header(weights: Path, path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return tensor → (dtype, shape) as the header of the weights has them."""
    try:
        return {name: (str(one["dtype"]), tuple(one["shape"])) for name, one in read_header(weights).items()}
    except (OSError, ConfigError, TypeError, KeyError) as error:
        raise AdapterError(f"{path}: {peft_dir.WEIGHTS} is no whole safetensors file ({error})") from error


def _named(dtype: object) -> str:
    return next(name for name, one in peft_dir.DTYPES.items() if np.dtype(one) == dtype)


def _ranks(
    entries: Mapping[str, tuple[str, tuple[int, ...]]],
    settings: PeftSettings,
    shapes: peft_dir.Shapes,
    max_rank: int,
    target_modules: tuple[str, ...],
) -> dict[str, int]:
    """Return module → rank of what an adapter changes; raise AdapterError where it does not fit this base."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, (dtype, shape) in entries.items():
        module, factor = _place(name, shapes, target_modules)
        if dtype not in peft_dir.DTYPES:
            raise AdapterError(f"{name} is {dtype}; it can be one of {', '.join(peft_dir.DTYPES)}")
        found.setdefault(module, {})[factor] = shape
    wanted = {module for module in shapes if settings.adapts(module)}
    if lost := sorted(wanted - found.keys()):
        raise AdapterError(f"{lost[0]} is adapted by its settings and has no weights{_more(lost)}; copy it again")
    if extra := sorted(found.keys() - wanted):
        raise AdapterError(f"{extra[0]} has weights that peft would not use by its settings{_more(extra)}")
    if not found:
        raise AdapterError("it has no weights")
    for module, factors in found.items():
        _require_shape(module, factors, settings.rank_of(module), shapes[module])
    ranks = {module: settings.rank_of(module) for module in sorted(found)}
    if (rank := max(ranks.values())) > max_rank:
        raise AdapterError(
            f"its rank is {rank}, and [engine].max_lora_rank is {max_rank}; set that to {rank} and start the site again"
        )
    return ranks


def _place(name: str, shapes: peft_dir.Shapes, target_modules: tuple[str, ...]) -> tuple[str, str]:
    """Return module and factor of a tensor; raise AdapterError for one that cannot be served here."""
    for pattern, what in _NOT_PLAIN.items():
        if re.search(pattern, name):
            raise AdapterError(f"{name[:200]} is {what}")
    match = peft_dir.KEY.fullmatch(name)
    if match is None:
        raise AdapterError(
            f"{name[:200]} is no factor of LoRA as peft saves it (base_model.model.….lora_A.weight or …lora_B.weight)"
        )
    module, factor = match["module"], match["factor"]
    if module in shapes:
        return module, factor
    linear = module.rpartition(".")[2]
    if linear in LINEARS and linear not in target_modules and _LAYER.match(module):
        raise AdapterError(
            f"{module} is adapted; add {linear!r} to the sites' [engine].target_modules, and start them again (at an "
            "import: to --target-modules, too)"
        )
    raise AdapterError(f"{module[:200]} is adapted, and this base has no such linear layer; is it for another base?")


def _require_shape(module: str, factors: Mapping[str, tuple[int, ...]], rank: int, shape: tuple[int, int]) -> None:
    if len(factors) != 2:
        raise AdapterError(f"{module} has only lora_{next(iter(factors))}; copy it again")
    out_features, in_features = shape
    for factor, expected in (("A", (rank, in_features)), ("B", (out_features, rank))):
        if factors[factor] != expected:
            raise AdapterError(
                f"{module}.lora_{factor} has shape {list(factors[factor])}, and this base with rank {rank} needs "
                f"{list(expected)}; is it for another base?"
            )


def _canonical(
    pairs: Mapping[str, tuple[peft_dir.Array, peft_dir.Array]],
    settings: PeftSettings,
    shapes: peft_dir.Shapes,
    ranks: Mapping[str, int],
    fill: np.random.Generator | None,
) -> peft_dir.Tensors:
    """Return the factors of every module in float32, with one rank, and the scaling in B."""
    rank = max(ranks.values())
    tensors: peft_dir.Tensors = {}
    for module, (out_features, in_features) in shapes.items():
        whole_a: peft_dir.Array = np.zeros((rank, in_features), np.float32)
        if fill is not None:
            whole_a = peft_dir.untrained(module, shapes[module], rank, np.float32, fill)[peft_dir.key(module, "A")]
        whole_b = np.zeros((out_features, rank), np.float32)
        if module in ranks:
            a, b = (factor.astype(np.float32) for factor in pairs[module])
            for factor, array in (("A", a), ("B", b)):
                if not np.isfinite(array).all():
                    raise AdapterError(f"{module}.lora_{factor} holds NaN or infinity; train it again")
            with np.errstate(over="ignore"):
                scaled = b * np.float32(settings.scaling(module))
            if not np.isfinite(scaled).all():
                raise AdapterError(f"{module}.lora_B times its scaling {settings.scaling(module):g} is too large")
            whole_a[: ranks[module]], whole_b[:, : ranks[module]] = a, scaled
        tensors[peft_dir.key(module, "A")], tensors[peft_dir.key(module, "B")] = whole_a, whole_b
    return tensors


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
