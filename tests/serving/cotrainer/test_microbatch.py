"""A micro-batch holds its rows up to the longest, and the positions that predict the tokens with a loss."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from serving.cotrainer.microbatch import MicroBatch, epochs, groups, row_lengths
from umbel.token_file import NO_LOSS, TokenFile

CPU = torch.device("cpu")


@pytest.fixture
def data() -> TokenFile:
    """Rows of 4, 2 and 3 tokens in a file of 6; the last two tokens of each carry a loss."""
    lengths = np.array([4, 2, 3], np.int32)
    ids, labels = np.zeros((3, 6), np.int32), np.full((3, 6), NO_LOSS, np.int32)
    for row, length in enumerate(lengths):
        ids[row, :length] = 10 * (row + 1) + np.arange(length)
        labels[row, length - 2 : length] = ids[row, length - 2 : length]
    return TokenFile(Path("test"), ids, labels, lengths)


def test_rows_are_cut_to_the_longest_of_them(data: TokenFile) -> None:
    assert MicroBatch.of(data, [1, 2], CPU).ids.tolist() == [[20, 21, 0], [30, 31, 32]]


@pytest.mark.parametrize(("lengths", "tokens"), [((2, 3, 5), 5), ((4, 6), 4), ((2,), 4), ((9,), 6)])
def test_rows_are_padded_to_the_first_length_that_holds_them(
    data: TokenFile, lengths: tuple[int, ...], tokens: int
) -> None:
    """Row 0 has 4 tokens, the file 6."""
    exact, padded = MicroBatch.of(data, [0, 2], CPU), MicroBatch.of(data, [0, 2], CPU, lengths)
    assert padded.ids.shape == (2, tokens)
    assert padded.ids[:, :4].equal(exact.ids)
    assert padded.answers.targets.equal(exact.answers.targets)
    assert padded.ids.flatten()[padded.answers.index + 1].equal(padded.answers.targets)


@pytest.mark.parametrize("seq_len", [8, 15, 16, 17, 100, 512, 2048])
def test_lengths_are_few_and_no_row_grows_by_more_than_a_quarter(seq_len: int) -> None:
    lengths = row_lengths(seq_len)
    assert lengths[-1] == seq_len
    assert list(lengths) == sorted(set(lengths))
    assert len(lengths) <= 4 * seq_len.bit_length()
    padded = {tokens: next(length for length in lengths if length >= tokens) for tokens in range(16, seq_len + 1)}
    assert all(length <= tokens * 1.25 for tokens, length in padded.items())
    assert {1 << power for power in range(4, seq_len.bit_length()) if 1 << power < seq_len} <= set(lengths), (
        "calibration times powers of two"
    )


@pytest.mark.parametrize(("rows", "size", "counts"), [(8, 4, [4, 4]), (7, 4, [4, 2, 1]), (5, 6, [4, 1]), (0, 4, [])])
def test_groups_are_whole_or_a_power_of_two(rows: int, size: int, counts: list[int]) -> None:
    found = groups(list(range(rows)), size)
    assert [len(group) for group in found] == counts
    assert [row for group in found for row in group] == list(range(rows))


def test_answers_are_predicted_one_position_earlier(data: TokenFile) -> None:
    batch = MicroBatch.of(data, [0, 2], CPU)
    answers = batch.answers
    assert answers.targets.tolist() == [12, 13, 31, 32]
    assert answers.rows.tolist() == [0, 0, 1, 1]
    assert answers.index.tolist() == [1, 2, 4 + 0, 4 + 1]
    assert batch.ids.flatten()[answers.index + 1].equal(answers.targets)


def test_the_first_token_of_a_row_is_never_an_answer(data: TokenFile) -> None:
    assert MicroBatch.of(data, [1], CPU).answers.targets.tolist() == [21]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 9])
def test_parts_are_all_answers_in_order(data: TokenFile, size: int) -> None:
    answers = MicroBatch.of(data, [0, 2], CPU).answers
    parts = [answers.part(at, size) for at in range(0, answers.count, size)]
    assert all(0 < part.count <= size for part in parts)
    for name in ("index", "rows", "targets"):
        assert torch.cat([getattr(part, name) for part in parts]).equal(getattr(answers, name))


def test_its_tensors_can_be_used_in_backward_passes(data: TokenFile) -> None:
    with torch.inference_mode():
        batch = MicroBatch.of(data, [0], CPU)
    assert not batch.ids.is_inference()


def test_each_epoch_has_every_row_once_in_another_order_and_the_same_for_a_seed() -> None:
    state = torch.get_rng_state()
    order = list(itertools.islice(epochs(50, seed=3), 100))
    assert sorted(order[:50]) == sorted(order[50:]) == list(range(50))
    assert order[:50] != order[50:]
    assert list(itertools.islice(epochs(50, seed=3), 100)) == order
    assert list(itertools.islice(epochs(50, seed=4), 100)) != order
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
