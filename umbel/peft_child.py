"""`ask`, `answer`: have a PEFT directory read by a process of its own; `look_in_child`: look at one there.

An adapter's settings hold regular expressions, and its header numbers of any size. Who reads them in its own process
may never come to its end, and answers no signal meanwhile.
"""

import contextlib
import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

from umbel import peft_import
from umbel.errors import AdapterError, NoRoom, UmbelError

LOOK_S = 30.0
"""Seconds that settings and a header may take."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk that takes no more."""
Given = TypeVar("Given", bound="Order")


class Order(BaseModel):
    """The adapter to read, and the base and the engine that it is for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path
    shapes: dict[str, tuple[int, int]]
    max_rank: int
    target_modules: tuple[str, ...]


def look_in_child(order: Order) -> int:
    """Return an adapter's rank as `peft_import.look` does. Raises AdapterError as `ask` does."""
    return int(ask(__name__, order, LOOK_S)["rank"])


def ask(module: str, order: Order, limit_s: float) -> dict[str, Any]:
    """Run a module as a program that `answer`s an order; return the answer.

    Raises AdapterError, also where the child dies or takes longer than `limit_s`, and NoRoom where the disk is full.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", module],
            input=order.model_dump_json().encode(), capture_output=True, timeout=limit_s, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise AdapterError(
            f"{order.path}: not read within {limit_s:.0f} s; is a pattern of its settings one that never ends?"
        ) from error
    if done.returncode != 0:
        raise AdapterError(
            f"{order.path}: the process that reads it ended with status {done.returncode}; a negative one is a signal, "
            f"-9 mostly means that memory ran out. {done.stderr.decode(errors='replace')[-500:]}"
        )
    found: dict[str, Any] = json.loads(done.stdout)
    if "error" in found:
        raise (NoRoom if found["full"] else AdapterError)(found["error"])
    return found


def answer(kind: type[Given], work: Callable[[Given], dict[str, Any]]) -> None:
    """Read an order from stdin, and write to stdout what `work` makes of it, or the error."""
    with contextlib.redirect_stdout(sys.stderr):
        try:
            found = work(kind.model_validate_json(sys.stdin.buffer.read()))
        except (UmbelError, OSError) as error:
            found = {"error": str(error), "full": getattr(error, "errno", None) in FULL}
    json.dump(found, sys.stdout)


def _looked(order: Order) -> dict[str, Any]:
    return {"rank": peft_import.look(order.path, order.shapes, order.max_rank, order.target_modules)}


if __name__ == "__main__":
    answer(Order, _looked)
