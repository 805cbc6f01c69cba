"""`Look`: the rows of an adapter's data that a round measures before it trains, and what their losses tell.

keys of all rows ──worth set──► measured rows, fresh rows ──one evaluation──► Seen of each domain ──decide──► …
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from client.worth.bursts import REPLAY, WORTH, rows_to_draw
from client.worth.decision import Decision, Seen
from client.worth.gain import Gain, Losses
from client.worth.memory import Memory
from client.worth.row_keys import Digests, RowKeys
from client.worth.worth_set import MOST, MOST_IN_ALL, Mask, Numbers, WorthSet, worth_set

FEWEST = 8
"""Rows of before from which on their own losses are what fresh ones are compared with; else those of the last look."""
NARROWEST = 0.02
"""Smallest standard deviation that losses are standardised by, as a part of their mean."""


@dataclass(frozen=True, eq=False)
class Look:
    """One round's look at the data: which rows are measured."""

    keys: RowKeys
    sets: WorthSet
    domains: tuple[str, ...]
    """Digest of the name of each domain, by its number."""
    fresh: Mask
    """[rows], true for a row whose content was not there at the last look."""
    measured: dict[str, Numbers]
    """Domain → the rows that are set aside of it."""
    sampled: dict[str, Numbers]
    """Domain → its newest fresh rows among those that are trained on."""

    @classmethod
    def at(cls, keys: RowKeys, domains: tuple[str, ...], known: Digests) -> "Look":
        """Choose the rows; `known` is the content of all rows at the last look, without any nothing is fresh."""
        sets = worth_set(keys)
        fresh = ~np.isin(keys.content, known) if len(known) else np.zeros(len(keys), bool)
        numbers = [int(number) for number in np.unique(sets.domain)]
        most = min(MOST, MOST_IN_ALL // max(1, len(numbers)))
        measured = {domains[number]: sets.measured(number) for number in numbers}
        sampled = {}
        for number in numbers:
            rows = np.flatnonzero(fresh & ~sets.aside & (sets.domain == number))
            sampled[domains[number]] = rows[-most:].astype(np.int32)
        return cls(keys, sets, domains, fresh, measured, sampled)

    @property
    def rows(self) -> Numbers:
        """All rows that are measured before the round trains, at most MOST_IN_ALL of each of both kinds."""
        return np.concatenate([*self.measured.values(), *self.sampled.values()])

    def seen(self, memory: Memory, losses: Losses) -> dict[str, Seen]:
        """Return what the `losses` of `rows` tell of each domain, against what is remembered of it."""
        by_row = dict(zip(self.rows.tolist(), losses.tolist(), strict=True))
        found = {}
        for key, rows in self.measured.items():
            known, here = memory.domain(key), np.array([by_row[row] for row in rows.tolist()])
            old = here[~self.fresh[rows]]
            mean, spread = (float(old.mean()), float(old.std())) if len(old) >= FEWEST else (known.mean, known.spread)
            drift = known.drift
            if spread:
                newest = np.array([by_row[row] for row in self.sampled[key].tolist()])
                drift = drift.after((newest - mean) / max(spread, NARROWEST * abs(mean)))
            of = self.domains.index(key)
            found[key] = Seen(
                share=float(np.mean(self.sets.domain == of)), above=self._above(rows, here, known.reached), drift=drift
            )
        return found

    def _above(self, rows: Numbers, losses: Losses, reached: Mapping[int, float]) -> float:
        """Return how far the losses are above those that the same rows have reached, if that is sure."""
        content = self.keys.content[rows].tolist()
        both = [number for number, one in enumerate(content) if one in reached]
        now, then = losses[both], np.array([reached[content[number]] for number in both])
        gain = Gain.between(now, then)
        sure = gain.lower > 0 and gain.mean >= WORTH * max(1.0, float(now.mean()))
        return gain.mean if sure else 0.0

    def to_measure(self, train: Sequence[str], drifted: frozenset[str]) -> tuple[Numbers, Losses]:
        """Return the rows that bursts of these domains are measured on, and their weights.

        In a drifted domain the fresh rows weigh 1 − REPLAY together, where there are enough of them.
        """
        rows, weights = [], []
        for key in train:
            one = self.measured[key]
            weight, fresh = np.ones(len(one)), self.fresh[one]
            if key in drifted and FEWEST <= fresh.sum() < len(one):
                weight[fresh] = (1 - REPLAY) * len(one) / fresh.sum()
                weight[~fresh] = REPLAY * len(one) / (~fresh).sum()
            rows.append(one)
            weights.append(weight)
        return np.concatenate(rows), np.concatenate(weights)

    def to_train(self, decision: Decision, seed: int) -> Numbers:
        """Return the row numbers that the round draws from."""
        chosen = np.isin(self.sets.domain, [self.domains.index(key) for key in decision.train])
        drifted = np.isin(self.sets.domain, [self.domains.index(key) for key in decision.drifted])
        train = ~self.sets.aside
        return rows_to_draw(
            np.flatnonzero(chosen & train).tolist(), np.flatnonzero(drifted & train & self.fresh).tolist(),
            np.flatnonzero(~chosen & train).tolist(), seed,
        )  # fmt: skip

    def known_after(self, kept_fresh: frozenset[str]) -> Digests:
        """Return the content that the next look knows: all that is here, but fresh rows of domains to go on with."""
        numbers = [self.domains.index(key) for key in kept_fresh]
        return self.keys.content[~(self.fresh & np.isin(self.sets.domain, numbers))]


def by_domain(look: Look, train: Sequence[str], rows: Numbers) -> Mapping[str, Mask]:
    """Return for each domain which of the measured rows are its own."""
    return {key: np.isin(rows, look.measured[key]) for key in train}
