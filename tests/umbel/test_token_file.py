"""Token files: examples are read back by memory map; anything else is refused."""

from pathlib import Path

import numpy as np
import pytest

from umbel.errors import DataError
from umbel.token_file import NO_LOSS, TokenFile, write


def test_reads_back_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "train.npy"
    write(path, [([5, 6, 7], [NO_LOSS, 6, 7]), ([9], [9])], seq_len=4, pad_id=1)
    tokens = TokenFile.open(path)
    assert (len(tokens), tokens.seq_len, tokens.loss_tokens()) == (2, 4, 3)
    assert tokens.ids.tolist() == [[5, 6, 7, 1], [9, 1, 1, 1]]
    assert tokens.labels.tolist() == [[NO_LOSS, 6, 7, NO_LOSS], [9, NO_LOSS, NO_LOSS, NO_LOSS]]
    assert tokens.lengths.tolist() == [3, 1]
    assert tokens.ids.dtype == np.int32


def test_is_mapped_read_only_and_private(tmp_path: Path) -> None:
    path = tmp_path / "train.npy"
    write(path, [([5], [5])], seq_len=4, pad_id=1)
    tokens = TokenFile.open(path)
    assert isinstance(tokens.ids, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        tokens.ids[0, 0] = 3
    assert path.stat().st_mode & 0o777 == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["train.npy"]


def test_may_be_empty(tmp_path: Path) -> None:
    write(tmp_path / "eval.npy", [], seq_len=4, pad_id=0)
    tokens = TokenFile.open(tmp_path / "eval.npy")
    assert (len(tokens), tokens.seq_len, tokens.loss_tokens()) == (0, 4, 0)


def test_a_mapped_file_survives_its_replacement(tmp_path: Path) -> None:
    path = tmp_path / "train.npy"
    write(path, [([5], [5])], seq_len=2, pad_id=0)
    before = TokenFile.open(path)
    write(path, [([8], [8])], seq_len=2, pad_id=0)
    assert before.ids[0, 0] == 5
    assert TokenFile.open(path).ids[0, 0] == 8


@pytest.mark.parametrize("example", [([], []), ([1, 2], [1]), ([1, 2, 3], [1, 2, 3])])
def test_refuses_an_example_that_does_not_fit(tmp_path: Path, example: tuple[list[int], list[int]]) -> None:
    with pytest.raises(DataError, match="example 0"):
        write(tmp_path / "train.npy", [example], seq_len=2, pad_id=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"not numpy", b"\x93NUMPY\x01\x00"])
def test_refuses_other_bytes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "train.npy"
    path.write_bytes(content)
    with pytest.raises(DataError, match="prepare the data again"):
        TokenFile.open(path)


def test_refuses_other_arrays_pickles_and_missing_files(tmp_path: Path) -> None:
    np.save(tmp_path / "other.npy", np.zeros((3, 2)))
    np.save(tmp_path / "pickle.npy", np.array([{}], dtype=object), allow_pickle=True)
    for name in ("other.npy", "pickle.npy", "missing.npy"):
        with pytest.raises(DataError, match=name):
            TokenFile.open(tmp_path / name)
