"""`make`: read a PEFT directory in a process of its own, and write it as the engine loads it."""

import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from umbel import peft_child, peft_dir, peft_import
from umbel.adapter import ServedRef
from umbel.errors import AdapterError

LIMIT_S = 120.0
"""Seconds that reading and writing an adapter may take."""


class Order(peft_child.Order):
    """The adapter to read, the base and the engine that it is for, and the place to write it to."""

    name: str
    dtype: str
    into: Path
    """Folder in which the adapter gets a folder of its own, named after its name and digest."""


class Made(BaseModel):
    """An adapter that is written."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: str
    source: str
    rank: int


def make(order: Order) -> Made:
    """Run `made` in a child. Raises AdapterError and NoRoom as `peft_child.ask` does."""
    return Made.model_validate(peft_child.ask(__name__, order, LIMIT_S))


def made(order: Order) -> Made:
    """Read, round and write an adapter; what is there already stays. Raises AdapterError, or OSError of the disk."""
    found = peft_import.read(order.path, order.shapes, order.max_rank, order.target_modules)
    served = peft_dir.rounded(found.tensors, order.dtype)
    if _changes(found.tensors) and not _changes(served):
        raise AdapterError(
            f"{order.path}: in {order.dtype} nothing of it is left, as B times its scaling rounds to zero; look at "
            "lora_alpha, or set [engine].dtype to one that holds smaller numbers"
        )
    weights = peft_dir.encode(served)
    digest = peft_dir.digest(weights)
    settings = peft_dir.encode_settings(rank=found.rank, target_modules=order.target_modules, base="")
    files = {peft_dir.WEIGHTS: weights, peft_dir.CONFIG: settings}
    folder = order.into / ServedRef.of(order.name, digest).folder_name
    if not folder.exists():
        peft_dir.place(folder, files)
    for name, content in files.items():
        if not (folder / name).is_file() or (folder / name).read_bytes() != content:
            peft_dir.replace_durably(folder / name, content)
    return Made(digest=digest, source=found.source, rank=found.rank)


def _changes(tensors: peft_dir.Tensors) -> bool:
    """Return whether an adapter changes anything: a B is not zero."""
    return any(b.any() for _, b in peft_dir.factors(tensors).values())


def _made(order: Order) -> dict[str, Any]:
    os.nice(10)  # users come first
    return made(order).model_dump()


if __name__ == "__main__":
    peft_child.answer(Order, _made)
