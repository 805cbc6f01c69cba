"""Checkpoints reach the disk whole or not at all, one at a time, and none after its job has ended."""

import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from serving.checkpoint import CheckpointHeader, FileMark, Origin
from serving.cotrainer.checkpoints.writer import CheckpointWriter, Snapshot
from umbel.errors import DataError
from umbel.messages import TrainPlan

MARK = FileMark(path="x", bytes=1, changed_ns=2)
ORIGIN = Origin(plan=TrainPlan(rank=1, steps=5, seconds=1.0), parent=MARK, data=MARK)


def snapshot(steps: int = 3) -> Snapshot:
    header = CheckpointHeader(origin=ORIGIN, rows="", drawn=8, progress={"steps": steps, "loss_sum": 0.1 + 0.2})
    layer = {"A": np.arange(6, dtype=np.float32), "A.step": np.array(3, np.float32)}
    return Snapshot(header, [layer, {"A": np.full(2, steps, np.float32)}])


@contextmanager
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Let no write end before the event is set."""
    go, fsync = threading.Event(), os.fsync

    def wait(file: int) -> None:
        assert go.wait(20)
        fsync(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", wait)
        yield go


def test_what_is_written_is_read_and_only_its_owner_can(tmp_path: Path) -> None:
    path, written = tmp_path / "checkpoint", snapshot()
    CheckpointWriter().write(path, written)
    header = CheckpointHeader.read(path)
    assert header.model_copy(update={"crc32": ()}) == written.header
    assert header.progress["loss_sum"] == 0.1 + 0.2, "to the last bit"
    assert header.steps == 3
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    read = safetensors.numpy.load_file(path)
    assert read.keys() == {"0.A", "0.A.step", "1.A"}
    for name, array in read.items():
        number, _, rest = name.partition(".")
        np.testing.assert_array_equal(array, written.layers[int(number)][rest], strict=True)
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_else_is_read_as_a_checkpoint(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"0.A": np.ones(2, np.float32)}, tmp_path / "another")
    for name in ("another", "missing"):
        with pytest.raises(DataError, match=f"{name}: damaged, or no checkpoint"):
            CheckpointHeader.read(tmp_path / name)


def test_one_is_written_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = CheckpointWriter()
    with slow_disk(monkeypatch) as go:
        assert writer.begin(tmp_path / "one", snapshot())
        assert writer.busy
        assert writer.begin(tmp_path / "other", snapshot()) is None
        go.set()
        writer.write(tmp_path / "last", snapshot())  # waits for its turn
    assert not writer.busy
    assert {path.name for path in tmp_path.iterdir()} == {"one", "last"}


def test_what_is_stopped_leaves_the_file_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, path = CheckpointWriter(), tmp_path / "checkpoint"
    writer.write(path, snapshot(1))
    with slow_disk(monkeypatch) as go:
        writing = writer.begin(path, snapshot(2))
        assert writing is not None
        writing.stop()
        go.set()
        writer.write(tmp_path / "next", snapshot())
    assert CheckpointHeader.read(path).steps == 1
    assert {file.name for file in tmp_path.iterdir()} == {"checkpoint", "next"}


def test_a_disk_that_takes_no_more_is_told_and_costs_only_the_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = CheckpointWriter()
    assert writer.begin(tmp_path / "nowhere" / "checkpoint", snapshot())
    with pytest.raises(FileNotFoundError):  # after the other one
        writer.write(tmp_path / "nowhere" / "checkpoint", snapshot())
    assert "checkpoint.failed" in caplog.text
    assert "No such file or directory" in caplog.text
