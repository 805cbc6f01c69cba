"""`weight_files`, `file_mistakes`: which files of a model directory SGLang loads, and whether they can be loaded.

Only headers are read, no weights. A shard (safetensors) begins with the length of its header (8 bytes, little-endian),
then the header as JSON: tensor → dtype, shape, and where its bytes begin and end behind the header. A packed base has
the tensors of `umbel.base.packed`.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from umbel.errors import ConfigError, UmbelError, UnsupportedModel

INDEX = "model.safetensors.index.json"
"""File that says, for each tensor of a base in several shards, which shard holds it."""
EMBEDDING = "model.embed_tokens.weight"
JSON_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "chat_template.json",
)  # fmt: skip
"""JSON files of a model directory, besides config.json, that SGLang or `transformers` read where they are there."""
TOKENIZERS = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
"""Files that make a tokenizer; those of one of them must be there."""
LONGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library."""
WEIGHT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Number formats of unquantised weights → bytes of a number."""
POINTER = b"version https://git-lfs"
"""Beginning of the file that Git leaves in the place of a large one."""
SHOWN = 3
"""Number of names that a message lists."""

Shape = tuple[int, ...] | None
"""Shape of a tensor; None: any."""
Header = dict[str, dict[str, Any]]
"""Tensor → `dtype`, `shape`, `data_offsets`."""


def weight_files(model: Path) -> list[Path]:
    """Return the shards that SGLang loads, sorted; raise ConfigError without any, or for an index that cannot be read.

    With an index, these are the ones that it names; without, all *.safetensors, except that `consolidated.safetensors`
    is left out beside `model.safetensors` (as SGLang's `filter_duplicate_safetensors_files` does).
    """
    names = {path.name for path in model.glob("*.safetensors")}
    if (model / INDEX).is_file():
        names &= set(_weight_map(model).values())
    elif names == {"consolidated.safetensors", "model.safetensors"}:
        names = {"model.safetensors"}
    if not names:
        raise ConfigError(_no_weights(model))
    return [model / name for name in sorted(names)]


def file_mistakes(model: Path, expected: Mapping[str, Shape]) -> Iterator[UmbelError]:
    """Yield what is wrong with the files of a model directory; `expected` is tensor → shape as config.json has them."""
    for name in JSON_FILES:
        if (model / name).is_file():
            try:
                json_object(model / name)
            except ConfigError as error:
                yield error
    try:
        shards = weight_files(model)
        indexed = _weight_map(model) if (model / INDEX).is_file() else {}
    except ConfigError as error:
        yield error
        return
    gone = sorted({name for name in indexed.values() if not (model / name).is_file() or Path(name).name != name})
    if gone:
        yield ConfigError(f"{model / INDEX}: names {_some(gone)}, not in this folder; copy the model directory again")
    headers: dict[str, Header] = {}
    for shard in shards:
        try:
            headers[shard.name] = read_header(shard)
        except ConfigError as error:
            yield error
    if not gone and len(headers) == len(shards):  # otherwise all that follows from it would be reported as well
        yield from _tensor_mistakes(model, headers, indexed, expected)


def tokenizer_mistakes(model: Path) -> Iterator[UmbelError]:
    """Yield that a model directory has no tokenizer."""
    if not any(all((model / name).is_file() for name in names) for names in TOKENIZERS):
        yield ConfigError(f"{model}: lacks tokenizer.json; copy the whole model directory there")


def embedding_rows(model: Path) -> int | None:
    """Return the rows of the embedding, that is one more than the largest token that the base can read.

    None where the files do not say it; `file_mistakes` says why.
    """
    try:
        for shard in weight_files(model):
            shape = read_header(shard).get(EMBEDDING, {}).get("shape")
            if shape:
                return int(shape[0])
    except ConfigError:
        pass  # `file_mistakes` reports it
    return None


def read_header(shard: Path) -> Header:
    """Return the header of a shard; raise ConfigError if it is no whole safetensors file."""
    size = shard.stat().st_size
    with shard.open("rb") as file:
        start = file.read(len(POINTER))
        if not start:
            raise ConfigError(f"{shard}: empty; copy it again")
        if start == POINTER:
            raise ConfigError(f"{shard}: a pointer of Git LFS, not the weights; run `git lfs pull` where it comes from")
        length = int.from_bytes(start[:8], "little")
        if len(start) < 8 or length > LONGEST_HEADER:
            raise ConfigError(f"{shard}: not a safetensors file; copy it again")
        file.seek(8)
        raw = file.read(length)
    if len(raw) < length:
        raise ConfigError(f"{shard}: cut off within its header, at {size:,} bytes; copy it again")
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        ends = [_end(entry) for entry in header.values()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise ConfigError(f"{shard}: not a safetensors file; copy it again") from error
    whole = 8 + length + max(ends, default=0)
    if size != whole:
        state = "cut off" if size < whole else "damaged"
        raise ConfigError(f"{shard}: {state}: it has {size:,} of {whole:,} bytes; copy it again")
    return dict(header)


def _end(entry: dict[str, Any]) -> int:
    """Return where a tensor's bytes end; raise ValueError if its entry contradicts itself."""
    begin, end = map(int, entry["data_offsets"])
    width = WEIGHT_BYTES.get(entry["dtype"])
    if not 0 <= begin <= end or (width is not None and end - begin != width * math.prod(entry["shape"])):
        raise ValueError(entry)
    return end


def _tensor_mistakes(
    model: Path, headers: Mapping[str, Header], indexed: Mapping[str, str], expected: Mapping[str, Shape]
) -> Iterator[UmbelError]:
    """Yield tensors that are not where the index says, twice there, missing, of another shape, or quantised."""
    astray = sorted(name for name, shard in indexed.items() if name not in headers[shard])
    if astray:
        yield ConfigError(
            f"{model / INDEX}: {_some(astray)} {_are(astray)} not in {indexed[astray[0]]}, where it says; "
            "copy the model directory again"
        )
    holders: dict[str, list[str]] = {}
    for shard, header in headers.items():
        for name in header:
            holders.setdefault(name, []).append(shard)
    stored = {name: entry["dtype"] for header in headers.values() for name, entry in header.items()}
    packed = [name.removesuffix(".absmax") for name in expected if name.endswith(".absmax")]
    if dense := sorted(name for name in packed if stored.get(name) in WEIGHT_BYTES):
        yield UnsupportedModel(
            f"{model}: config.json says that weights are packed in 4 bits, and {_some(dense)} {_are(dense)} stored as "
            f"{stored[dense[0]]}; remove quantization_config from config.json, or copy the packed directory again"
        )
        return
    if not packed and (scales := sorted(name for name in stored if name.endswith(".weight.absmax"))):
        yield ConfigError(
            f"{model}: has {_some(scales)}, so its weights are packed in 4 bits, and config.json lacks their "
            "quantization_config; copy config.json of the packed base"
        )
        return
    twice = sorted(name for name, shards in holders.items() if len(shards) > 1)
    if twice:
        yield ConfigError(
            f"{model}: {_some(twice)} {_are(twice)} in {' and in '.join(holders[twice[0]])}, and SGLang would load "
            "both; keep only the files of this model"
        )
    tensors = {name: entry for header in headers.values() for name, entry in header.items()}
    lacking = sorted(name for name in expected if name not in tensors and name not in astray)
    if lacking:
        yield ConfigError(
            f"{model}: no {_some(lacking)} in {_some(sorted(headers))}, so SGLang would serve numbers at random; "
            "give a whole model in the layout of Hugging Face"
        )
    odd = [
        (name, shape) for name, shape in expected.items()
        if name in tensors and shape is not None and tuple(tensors[name]["shape"]) != shape
    ]  # fmt: skip
    if odd:
        name, shape = odd[0]
        yield ConfigError(
            f"{model}: {name} has shape {tensors[name]['shape']}, and config.json asks for {list(shape)}; copy "
            "config.json and weights of one model"
        )
    # A weight in 4 bits and its scales begin with the same name.
    others = [name for name in expected if name in tensors and name.partition(".weight")[0] + ".weight" not in packed]
    quantised = sorted(name for name in others if tensors[name]["dtype"] not in WEIGHT_BYTES)
    if quantised:
        yield UnsupportedModel(
            f"{model}: {_some(quantised)} {_are(quantised)} stored as {tensors[quantised[0]]['dtype']}, and "
            "config.json tells of no quantisation; give the unquantised base"
        )


def _weight_map(model: Path) -> dict[str, str]:
    """Return tensor → shard as the index has it; raise ConfigError if it cannot be read."""
    found = json_object(model / INDEX).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise ConfigError(f"{model / INDEX}: no weight_map in it; copy the model directory again")
    return found


def json_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a model directory; raise ConfigError, naming the file, for anything else."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        what = "a pointer of Git LFS" if path.read_bytes().startswith(POINTER) else f"not JSON ({error})"
        raise ConfigError(f"{path}: {what}; copy the model directory again") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: not a JSON object; copy the model directory again")
    return value


def _no_weights(model: Path) -> str:
    if (model / INDEX).is_file():
        return (
            f"{model}: lacks all *.safetensors (the weights) that {INDEX} names; copy the whole model directory there"
        )
    if any(model.glob("*.bin")) or any(model.glob("*.pt")) or any(model.glob("*.gguf")):
        return f"{model}: no *.safetensors here, only weights of another format; convert the base's weights to them"
    return f"{model}: no *.safetensors here (the weights); copy the whole model directory there"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _are(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"
