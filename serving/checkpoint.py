"""`CheckpointHeader`: what the file of a job's state says about itself; the co-trainer writes it, the daemon reads it.

A checkpoint is a safetensors file: the header as JSON in its metadata, and for each layer the buffers of its factors
and AdamW's moments. It holds what was learnt from a site's examples, so only its owner can read it.
"""

import zlib
from pathlib import Path
from typing import Any, Literal, Self

import safetensors
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from umbel.errors import DataError
from umbel.messages import TrainPlan

METADATA, CRC32 = "checkpoint", "crc32"
"""Names in a file's metadata: the header, and its own checksum as decimal digits."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileMark(_Part):
    """A file by its path, size and time of change. Token files and parents are written once, and then only replaced.

    Their content is not digested: that would hold up the scheduler.
    """

    path: str
    bytes: NonNegativeInt
    changed_ns: int

    @classmethod
    def of(cls, path: str) -> Self:
        """Look at a file. Raises OSError where there is none."""
        found = Path(path).stat()
        return cls(path=path, bytes=found.st_size, changed_ns=found.st_mtime_ns)


class Origin(_Part):
    """What a checkpoint is of: a job with another plan, parent or data begins anew."""

    plan: TrainPlan
    parent: FileMark
    data: FileMark


class CheckpointHeader(_Part):
    """Everything that a job goes on from, but the numbers of the adapter."""

    format: Literal[1] = 1
    origin: Origin
    rows: str
    """Digest of the row numbers that were drawn from; empty where it was every row."""
    drawn: NonNegativeInt
    """Rows drawn from them so far, in the order that the plan's seed gives."""
    progress: dict[str, int | float]
    """Fields of the co-trainer's `Progress`."""
    crc32: tuple[NonNegativeInt, ...] = ()
    """Checksum of each layer's tensors."""

    @property
    def steps(self) -> int:
        """Return the optimizer steps that were applied."""
        return int(self.progress["steps"])

    def metadata(self) -> dict[str, str]:
        """Return the metadata of the file."""
        text = self.model_dump_json()
        return {METADATA: text, CRC32: str(zlib.crc32(text.encode()))}

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the header of a file. Raises DataError for one that is damaged, or of another release."""
        try:
            file: Any = safetensors.safe_open(path, framework="numpy")
            with file:
                metadata: dict[str, str] = file.metadata() or {}
            text = metadata[METADATA]
            if metadata[CRC32] != str(zlib.crc32(text.encode())):
                raise DataError(f"{path}: damaged")
            return cls.model_validate_json(text)
        except (OSError, safetensors.SafetensorError, KeyError, ValidationError) as error:
            raise DataError(f"{path}: damaged, or no checkpoint of this release") from error
