"""The rows that are set aside: the same ones for ever, never those that ask what is trained on, and never too many."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.worth.row_keys import RowKeys
from client.worth.worth_set import LEAST, MOST, MOST_IN_ALL, worth_set
from umbel.errors import DataError


def keys(*domains: int, first: int = 0, rows_each: int = 1) -> RowKeys:
    """Keys of so many examples in each domain, each of which asks something of its own."""
    rows = []
    for domain, count in enumerate(domains):
        for number in range(first, first + count):
            asks = hashlib.sha256(f"{domain} {number}".encode()).hexdigest()
            rows += [(hashlib.sha256(asks.encode()).hexdigest(), asks, domain)] * rows_each
    return RowKeys.of(rows)


def asked(keys: RowKeys) -> set[int]:
    return set(keys.asks[worth_set(keys).aside].tolist())


def test_a_tenth_is_set_aside_and_at_most_so_many() -> None:
    small, large = worth_set(keys(400)), worth_set(keys(20_000))
    assert 20 <= small.aside.sum() <= 60
    assert large.aside.sum() == MOST
    assert len(large.train) == 20_000 - MOST


def test_of_too_few_rows_none_is_set_aside() -> None:
    few = worth_set(keys(60))
    assert (few.known, few.aside.sum(), len(few.train)) == (False, 0, 60)
    assert not worth_set(keys(0)).known


def test_nobody_changes_sides_when_lines_are_added() -> None:
    before, after = keys(300), keys(500)
    assert asked(before) <= asked(after)


def test_what_asks_the_same_is_on_one_side() -> None:
    several = keys(300, rows_each=3)
    sets = worth_set(several)
    assert sets.known
    assert not set(several.asks[sets.aside].tolist()) & set(several.asks[sets.train].tolist())


@given(st.lists(st.integers(0, 900), min_size=1, max_size=14))
def test_every_domain_is_measured_with_enough_rows_or_with_the_largest(sizes: list[int]) -> None:
    of = keys(*sizes)
    sets = worth_set(of)
    assert sets.aside.sum() <= max(MOST, MOST_IN_ALL)
    if not sets.known:
        return
    for domain in np.unique(sets.domain).tolist():
        alone = sets.measured(domain)
        assert len(alone) >= LEAST or len(np.unique(sets.domain)) == 1
        assert domain in of.domain
    assert len(sets.train) + sets.aside.sum() == len(of)


def test_keys_survive_their_file_which_is_its_owners_only(tmp_path: Path) -> None:
    of = keys(30, 20)
    of.write(tmp_path / "train.keys")
    found = RowKeys.read(tmp_path / "train.keys")
    assert [(found.content == of.content).all(), (found.asks == of.asks).all(), (found.domain == of.domain).all()] == [
        True, True, True,
    ]  # fmt: skip
    assert (tmp_path / "train.keys").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("content", [None, b"", b"junk", b"\x93NUMPY\x01\x00v\x00{'descr': '<f8'}"])
def test_keys_that_cannot_be_read_are_named(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "train.keys").write_bytes(content)
    with pytest.raises(DataError, match=r"train\.keys: not the keys of a token file"):
        RowKeys.read(tmp_path / "train.keys")
