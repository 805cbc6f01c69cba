"""`Bursts`: how a round spends its steps: in bursts, after each of which its gain is measured, until it is flat.

    parent ──burst──► worth set ──burst──► worth set ── … ──flat, or no step left──► the best of all, if it pays

Steps are spent as in Ekya (arXiv 2012.10557): what a little training brings tells whether more of it is worth the time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from client.worth.gain import Gain, Losses

TRIAL = 4
"""Steps of the first burst where it is doubtful that training pays, besides those in which the learning rate rises. If
they do not pay, there are no others."""
LEAST = 8
"""Steps of a burst; fewer change too little to be measured."""
PARTS = 4
"""Bursts that a round's steps are cut into."""
WORTH = 0.005
"""Part of the loss by which it has to be lowered to count as such; of a loss below 1 as many nats per token. What is
learnt to the last token falls by a part for ever."""
FLAT = 2
"""Bursts that end a round if they have not lowered the loss; alone, one is lost in the noise of few examples."""


@dataclass
class Bursts:
    """One round's bursts so far."""

    before: Losses
    """[examples], losses of the worth set under the adapter that the round began with, in nats per token."""
    steps: int
    """Steps that the round may take."""
    doubtful: bool = False
    warmup: int = 0
    """Steps in which the learning rate rises."""
    weights: Losses | None = None
    """[examples], weights of the examples; None: alike."""
    taken: list[int] = field(default_factory=list)
    """Number of steps after each burst, of all bursts together."""
    losses: list[Losses] = field(default_factory=list)
    """The same examples' losses then."""

    @property
    def until(self) -> int:
        """The number of steps at which the next burst ends; 0 where the round is over."""
        if not self.taken:
            first = TRIAL + self.warmup if self.doubtful else max(LEAST, -(-self.steps // PARTS))
            return min(self.steps, first)
        if self.taken[-1] >= self.steps or self.flat or (self.doubtful and not self.pays):
            return 0
        return min(self.steps, self.taken[-1] + max(LEAST, -(-self.steps // PARTS)))

    def add(self, taken: int, losses: Losses) -> None:
        """Note what a burst has come to."""
        self.taken.append(taken)
        self.losses.append(losses)

    def gain(self, burst: int) -> Gain:
        """Return how much lower the loss is after a burst than before the round."""
        return Gain.between(self.before, self.losses[burst], self.weights)

    @property
    def pays(self) -> bool:
        """True where the best burst has lowered the loss with confidence, and by WORTH at least."""
        return self._falls(self.before, self.losses[self.best])

    @property
    def flat(self) -> bool:
        """True where the last FLAT bursts together have not lowered the loss so."""
        ends = [self.before, *self.losses]
        return len(self.losses) >= FLAT and not self._falls(ends[-1 - FLAT], ends[-1])

    @property
    def best(self) -> int:
        """The burst after which the loss was lowest."""
        return int(np.argmin([self._mean(losses) for losses in self.losses]))

    def _falls(self, before: Losses, after: Losses) -> bool:
        gain = Gain.between(before, after, self.weights)
        return gain.lower > 0 and gain.mean >= WORTH * max(1.0, self._mean(before))

    def _mean(self, losses: Losses) -> float:
        mean = float(np.average(losses, weights=self.weights))
        return mean if np.isfinite(mean) else float("inf")


def rows_to_draw(
    chosen: Sequence[int], fresh: Sequence[int], others: Sequence[int], seed: int
) -> "np.typing.NDArray[np.int32]":
    """Return the row numbers to train on: `chosen`, of which `fresh` are drawn more often, and a few of the `others`.

    `fresh` are repeated, up to MOST_REPEATED times, until they are 1 − REPLAY of what is drawn; of `others` come as
    many as are REPLAY of it, chosen by `seed`.
    """
    old = np.setdiff1d(np.asarray(chosen, np.int32), np.asarray(fresh, np.int32))
    times = 1
    if len(fresh) and len(old):
        times = min(MOST_REPEATED, max(1, round(len(old) * (1 - REPLAY) / REPLAY / len(fresh))))
    taken = np.concatenate([old, np.tile(np.asarray(fresh, np.int32), times)])
    count = min(len(others), int(len(taken) * REPLAY / (1 - REPLAY)))
    replayed = np.random.default_rng(seed).choice(np.asarray(others, np.int32), count, replace=False)
    return np.sort(np.concatenate([taken, replayed])).astype(np.int32)


REPLAY = 0.2
"""Part of what is drawn that is not what a round is about, so that it is not forgotten."""
MOST_REPEATED = 16
"""Times that a fresh example is drawn for each other one; a handful of them would be learnt by heart."""
