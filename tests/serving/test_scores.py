"""Scores of single examples: written and read as they are, summed for others, and shown to nobody."""

from pathlib import Path

import numpy as np
import pytest

from serving.scores import Scores

SCORES = Scores(
    loss=np.array([0.1, 123.456, 0.0]), tokens=np.array([3, 500, 1], np.int32), exact=np.array([True, False, True])
)


def test_scores_are_read_as_they_were_written(tmp_path: Path) -> None:
    file = tmp_path / "scores.npy"
    SCORES.write(file)
    found = Scores.read(file)
    for name in ("loss", "tokens", "exact"):
        written, read = getattr(SCORES, name), getattr(found, name)
        assert written.dtype == read.dtype
        assert np.array_equal(written, read)
    assert len(found) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["scores.npy"]


def test_only_sums_leave_the_site() -> None:
    sums = SCORES.sums
    assert sums.loss_sum == pytest.approx(123.556)
    assert (sums.loss_tokens, sums.exact, sums.examples) == (504, 2, 3)
    assert "123" not in repr(SCORES)


def test_a_file_that_is_cut_or_holds_a_pickle_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "scores.npy"
    SCORES.write(file)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="file seems not fully written"):
        Scores.read(file)
    np.save(file, np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        Scores.read(file)
    with pytest.raises(FileNotFoundError):
        Scores.read(tmp_path / "none.npy")


def test_scores_of_pairs_are_of_their_margins() -> None:
    """The chosen answer has a log-probability of -1, -4 and -2, the rejected one of -3, -1 and -2."""
    rows = Scores(np.array([1.0, 3, 4, 1, 2, 2]), np.full(6, 5, np.int32), np.full(6, True))
    pairs = rows.paired()
    assert pairs.loss == pytest.approx(-np.log(1 / (1 + np.exp(-np.array([2.0, -3.0, 0.0])))))
    assert (pairs.exact.tolist(), pairs.tokens.tolist()) == ([True, False, False], [1, 1, 1])
    assert (pairs.sums.pairs, pairs.sums.examples, pairs.sums.loss_tokens, pairs.sums.exact) == (True, 3, 3, 1)
    assert pairs.grouped([0, 0, 1]).by_cluster(pairs.exact).tolist() == [[1.0, 0.0]]
    assert np.isnan(Scores(np.array([np.nan, 1.0]), rows.tokens[:2], rows.exact[:2]).paired().loss).all()
