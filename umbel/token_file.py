"""`TokenFile`: tokenised training examples on disk, one record of fixed length per example, read by memory map.

A token file is one `.npy` array of records (length, ids, labels). It holds private text as token ids: it stays at the
site, and only its owner can read it.
"""

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from umbel import secret_file
from umbel.errors import DataError

Ints = npt.NDArray[np.int32]
LabelledTokens = tuple[Sequence[int], Sequence[int]]
"""(ids, labels) of one example: equally long, not padded."""

NO_LOSS = -100
"""Label of a position without a loss (PyTorch's `ignore_index`)."""


def record(seq_len: int) -> np.dtype[np.void]:
    """Return the dtype of one example's record."""
    return np.dtype([("length", "<i4"), ("ids", "<i4", (seq_len,)), ("labels", "<i4", (seq_len,))])


@dataclass(frozen=True)
class TokenFile:
    """An opened token file; arrays are read-only views of the mapped file.

    `labels[n, t]` is the id at the same position `t`, or NO_LOSS: code that computes the loss shifts by one.
    """

    path: Path
    ids: Ints
    """[examples, seq_len], padded at the end."""
    labels: Ints
    """[examples, seq_len]."""
    lengths: Ints
    """[examples]: number of tokens before the padding."""

    @classmethod
    def open(cls, path: Path) -> Self:
        """Map a token file; raise DataError for anything else."""
        try:
            records = np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # numpy parses the header as Python, and lets any error of that parser through
            raise DataError(f"{path}: not a token file ({error}); remove it and prepare the data again") from error
        seq_len = records.dtype["ids"].shape[0] if "ids" in (records.dtype.names or ()) else 0
        if records.ndim != 1 or seq_len == 0 or records.dtype != record(seq_len):
            raise DataError(f"{path}: not a token file of this release; remove it and prepare the data again")
        return cls(path, records["ids"], records["labels"], records["length"])

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def seq_len(self) -> int:
        """Tokens per record, padding included."""
        return int(self.ids.shape[1])

    def loss_tokens(self) -> int:
        """Count the tokens with a loss in the whole file."""
        return int(np.count_nonzero(self.labels != NO_LOSS))


def write(path: Path, examples: Sequence[LabelledTokens], *, seq_len: int, pad_id: int) -> None:
    """Write a token file by atomic rename, row by row: the padding of all examples is never in memory at once.

    Raises DataError for an example that is empty or longer than `seq_len`.
    """
    for number, (ids, labels) in enumerate(examples):
        if not 0 < len(ids) == len(labels) <= seq_len:
            raise DataError(f"{path}: example {number} has {len(ids)} ids, {len(labels)} labels; seq_len is {seq_len}")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "xb", opener=secret_file.opener) as file:
            file.write(_header(len(examples), seq_len))
            for ids, labels in examples:
                row = np.zeros((), record(seq_len))
                row["length"], row["ids"], row["labels"] = len(ids), pad_id, NO_LOSS
                row["ids"][: len(ids)], row["labels"][: len(ids)] = ids, labels
                file.write(row.tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_rows(path: Path, source: TokenFile, rows: Sequence[int]) -> None:
    """Write a token file of some rows of another one, which is its owner's only; a file that is there is replaced."""
    records = np.zeros(len(rows), record(source.seq_len))
    for part, array in (("length", source.lengths), ("ids", source.ids), ("labels", source.labels)):
        records[part] = array[np.asarray(rows, np.int64)]
    path.unlink(missing_ok=True)
    with open(path, "xb", opener=secret_file.opener) as file:
        file.write(_header(len(rows), source.seq_len))
        file.write(records.tobytes())


def _header(examples: int, seq_len: int) -> bytes:
    """Return the bytes that numpy writes before the records."""
    described = {"descr": record(seq_len).descr, "fortran_order": False, "shape": (examples,)}
    file = io.BytesIO()
    write_header: Any = np.lib.format.write_array_header_1_0
    write_header(file, described)
    return file.getvalue()
