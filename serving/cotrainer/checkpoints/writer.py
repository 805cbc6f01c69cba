"""`CheckpointWriter`: puts snapshots of jobs on disk, one at a time, from a thread: no quantum waits for a disk."""

import json
import logging
import os
import threading
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from serving.checkpoint import CheckpointHeader
from umbel import secret_file
from umbel.peft_dir import sync_directory

Layer = dict[str, npt.NDArray[np.float32]]
"""Name of a tensor of `LayerFactors.kept` → a copy of it on the host."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """State of a job between two steps, in memory of its own."""

    header: CheckpointHeader
    layers: Sequence[Layer]

    def encoded(self) -> Iterator[bytes | memoryview]:
        """Yield the parts of a safetensors file; no more is copied than its header."""
        header = self.header.model_copy(update={"crc32": tuple(map(checksum, self.layers))})
        entries: dict[str, Any] = {"__metadata__": header.metadata()}
        end = 0
        for number, layer in enumerate(self.layers):
            for name, array in layer.items():
                begin, end = end, end + array.nbytes
                entries[f"{number}.{name}"] = {
                    "dtype": "F32", "shape": list(array.shape), "data_offsets": [begin, end],
                }  # fmt: skip
        encoded = json.dumps(entries).encode()
        encoded += b" " * (-len(encoded) % 8)
        yield len(encoded).to_bytes(8, "little") + encoded
        for layer in self.layers:
            yield from map(_bytes, layer.values())


class Writing:
    """One snapshot on its way to a file, which it replaces whole or not at all."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._stopped = False

    def stop(self) -> None:
        """Do not replace the file any more; it is replaced already, or stays as it is, when this returns."""
        with self._lock:
            self._stopped = True

    def run(self, snapshot: Snapshot) -> None:
        """Write the file, which only its owner can read; it is on disk on return. Raises OSError."""
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        try:
            with open(temporary, "wb", opener=secret_file.opener) as file:
                for part in snapshot.encoded():
                    if self._stopped:
                        return
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            with self._lock:
                if self._stopped:
                    return
                os.replace(temporary, self._path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_directory(self._path.parent)


class CheckpointWriter:
    """Writes the snapshots of all jobs, one at a time: there is memory for the copy of one."""

    def __init__(self) -> None:
        self._turn = threading.Lock()

    @property
    def busy(self) -> bool:
        """Return whether a snapshot is being written."""
        return self._turn.locked()

    def begin(self, path: Path, snapshot: Snapshot) -> Writing | None:
        """Have a thread write a snapshot; None where another one is being written. A failure is logged."""
        if not self._turn.acquire(blocking=False):
            return None
        writing = Writing(path)
        threading.Thread(target=self._run, args=(writing, path, snapshot), daemon=True).start()
        return writing

    def write(self, path: Path, snapshot: Snapshot) -> None:
        """Write a snapshot now, after the one that is being written. Raises OSError."""
        with self._turn:
            Writing(path).run(snapshot)

    def _run(self, writing: Writing, path: Path, snapshot: Snapshot) -> None:
        try:
            writing.run(snapshot)
        except OSError as error:  # the job goes on; only what a death of this engine would cost is more
            logger.warning("checkpoint.failed %s is as before: %s", path, error.strerror)
        finally:
            self._turn.release()


def checksum(layer: Layer) -> int:
    """Return the CRC-32 of a layer's numbers, in the order of their names."""
    crc = 0
    for _, array in sorted(layer.items()):
        crc = zlib.crc32(_bytes(array), crc)
    return crc


def _bytes(array: npt.NDArray[np.float32]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data
