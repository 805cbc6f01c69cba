"""`worth_set`: the rows that an adapter is measured on while it trains, and never trained on.

Verdicts have held-out examples of their own: what decides when training ends would soon have learnt those by heart.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from client.worth.row_keys import RowKeys

SHARE = 0.1
"""Part of what the examples ask that may be set aside, chosen by its digest: it stays on its side for ever."""
LEAST, MOST = 16, 64
"""Rows of a domain that are set aside at most, and with fewer than which nothing can be told of it."""
MOST_IN_ALL = 128
"""Rows that are set aside of all domains together. To evaluate 128 takes about as long as five optimizer steps of eight
rows: a row without its backward pass is a third of one with it."""

Mask = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class WorthSet:
    """The two sides of an adapter's training rows."""

    aside: Mask
    """[rows], true for a row that is measured on and never trained on."""
    domain: Numbers
    """[rows], number of the domain that a row is measured with."""
    known: bool
    """False where so few rows are there that nothing can be told; then none is set aside, and all are trained on."""

    @property
    def train(self) -> Numbers:
        """Row numbers that may be trained on."""
        return np.flatnonzero(~self.aside).astype(np.int32)

    def measured(self, domain: int) -> Numbers:
        """Row numbers that a domain is measured on."""
        return np.flatnonzero(self.aside & (self.domain == domain)).astype(np.int32)


def worth_set(keys: RowKeys) -> WorthSet:
    """Choose the rows that are set aside: in each domain those with the smallest digests of what they ask.

    All rows that ask the same are on one side. A domain in which too few would be set aside is measured with the
    largest one.
    """
    domain = _joined(keys)
    domains = np.unique(domain)
    most = min(MOST, max(LEAST, MOST_IN_ALL // max(1, len(domains))))
    aside = np.zeros(len(keys), bool)
    for one in domains:
        aside |= _chosen(keys, domain == one, most)
    enough = int(aside.sum()) >= LEAST
    return WorthSet(aside if enough else np.zeros(len(keys), bool), domain, enough)


def _joined(keys: RowKeys) -> Numbers:
    """Return the domain that each row is measured with: its own, or the largest one for a domain that is too small."""
    numbers, counts = np.unique(keys.domain, return_counts=True)
    if not len(numbers):
        return keys.domain
    largest = numbers[np.argmax(counts)]
    most = MOST_IN_ALL // LEAST
    by_size = numbers[np.argsort(-counts, kind="stable")][:most]
    alone = [one for one in by_size if _chosen(keys, keys.domain == one, LEAST).sum() >= LEAST]
    return np.where(np.isin(keys.domain, alone), keys.domain, largest).astype(np.int32)


def _chosen(keys: RowKeys, of: Mask, most: int) -> Mask:
    """Return which of the rows `of` a domain are set aside, at most `most`."""
    places = np.flatnonzero(of & (keys.asks < np.uint64(int(SHARE * 2**64))))
    asks, first, counts = np.unique(keys.asks[places], return_index=True, return_counts=True)
    del first
    fits = asks[np.cumsum(counts) <= most]
    chosen = np.zeros(len(of), bool)
    chosen[places] = np.isin(keys.asks[places], fits)
    return chosen
