"""Tokenised examples of fixed length on disk, memory-mapped by whoever reads them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from umbel.errors import DataError
from umbel.peft_dir import replace_durably

Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class TokenFile:
    """One example per row: `ids` and `labels` [n, seq_len], `lengths` [n].

    Labels stand at the position of their own token (Hugging Face's convention), -100 where there is no loss.
    """

    ids: Int32
    labels: Int32
    lengths: Int32

    def write(self, path: Path) -> None:
        """Write the file whole or not at all."""
        arrays = {"ids": self.ids, "labels": self.labels, "lengths": self.lengths}
        replace_durably(path, safetensors.numpy.save(arrays))

    @classmethod
    def read(cls, path: Path) -> "TokenFile":
        """Read what `write` wrote; raise DataError for anything else."""
        try:
            arrays = safetensors.numpy.load_file(path)
            return cls(ids=arrays["ids"], labels=arrays["labels"], lengths=arrays["lengths"])
        except (OSError, KeyError, safetensors.SafetensorError) as error:
            raise DataError(f"{path}: not a token file ({error}); remove it, and it is made again") from error
