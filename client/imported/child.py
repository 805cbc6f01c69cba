"""`make`: read a PEFT directory in a process of its own, and write it as the engine loads it.

An adapter's settings hold regular expressions, and one that never ends would stop the daemon. The child has a limit.
"""

import contextlib
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from umbel import peft_dir, peft_import
from umbel.adapter import ServedRef
from umbel.errors import AdapterError, NoRoom, UmbelError

LIMIT_S = 120.0
"""Seconds that reading and writing an adapter may take."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk that takes no more."""


class Order(BaseModel):
    """The adapter to read, the base and the engine that it is for, and the place to write it to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    path: Path
    shapes: dict[str, tuple[int, int]]
    max_rank: int
    target_modules: tuple[str, ...]
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
    """Run `made` in a child.

    Raises AdapterError, also where the child dies or takes longer than LIMIT_S, and NoRoom where the disk is full.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "client.imported.child"],
            input=order.model_dump_json().encode(), capture_output=True, timeout=LIMIT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise AdapterError(
            f"{order.path}: not read within {LIMIT_S:.0f} s; is a pattern of its settings one that never ends?"
        ) from error
    if done.returncode != 0:
        raise AdapterError(
            f"{order.path}: the process that reads it ended with status {done.returncode}; a negative one is a signal, "
            f"-9 mostly means that memory ran out. {done.stderr.decode(errors='replace')[-500:]}"
        )
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise (NoRoom if answer["full"] else AdapterError)(answer["error"])
    return Made.model_validate(answer)


def made(order: Order) -> Made:
    """Read, round and write an adapter; what is there already stays. Raises AdapterError, or OSError of the disk."""
    found = peft_import.read(order.path, order.shapes, order.max_rank, order.target_modules)
    weights = peft_dir.encode(peft_dir.rounded(found.tensors, order.dtype))
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


def main() -> None:
    """Read an order from stdin, write the answer to stdout."""
    os.nice(10)  # users come first
    with contextlib.redirect_stdout(sys.stderr):
        try:
            answer = made(Order.model_validate_json(sys.stdin.buffer.read())).model_dump()
        except (UmbelError, OSError) as error:
            answer = {"error": str(error), "full": getattr(error, "errno", None) in FULL}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
