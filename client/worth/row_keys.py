"""`RowKeys`: for each row of a token file, digests of its example and of what that one asks, and its domain.

A domain is a part of an adapter's data that is trained or left out as a whole: the file that its examples come from, or
what their author wrote as their `domain`.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from umbel import secret_file
from umbel.errors import DataError

KEYS = "train.keys"
"""Name of the file beside the token file, in numpy's format."""
Digests = npt.NDArray[np.uint64]
_RECORD = np.dtype([("content", "<u8"), ("asks", "<u8"), ("domain", "<i4")])


@dataclass(frozen=True, eq=False)
class RowKeys:
    """The keys of all rows, in the order of the token file."""

    content: Digests
    """[rows], 8 bytes of the digest of the example that a row is of."""
    asks: Digests
    """[rows], 8 bytes of the digest of what that example asks."""
    domain: npt.NDArray[np.int32]
    """[rows], number of its domain."""

    def __len__(self) -> int:
        return len(self.content)

    @classmethod
    def of(cls, rows: Sequence[tuple[str, str, int]]) -> "RowKeys":
        """Make the keys of (content, asks, domain) for each row; the first two are digests in hexadecimal digits.

        Of what is asked other digits are taken than those by which examples are held out for verdicts: all that are
        smallest by those are held out already.
        """
        taken = [(int(content[:16], 16), int(asks[16:32], 16), domain) for content, asks, domain in rows]
        records = np.array(taken, _RECORD)
        return cls(records["content"], records["asks"], records["domain"])

    def write(self, path: Path) -> None:
        """Write the keys to a new file that only its owner can read."""
        records = np.empty(len(self), _RECORD)
        records["content"], records["asks"], records["domain"] = self.content, self.asks, self.domain
        buffer = io.BytesIO()
        np.save(buffer, records, allow_pickle=False)
        with open(path, "xb", opener=secret_file.opener) as file:
            file.write(buffer.getvalue())

    @classmethod
    def read(cls, path: Path) -> "RowKeys":
        """Read a file that `write` wrote; raise DataError for anything else."""
        try:
            records = np.load(path, allow_pickle=False)
            return cls(records["content"], records["asks"], records["domain"])
        except Exception as error:  # numpy parses the header as Python, and lets any error of that parser through
            raise DataError(f"{path}: not the keys of a token file ({error}); restart `umbel serve`") from error
