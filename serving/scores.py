"""`Scores`: the result of an adapter, or of the base, on each example of a set; versions are compared by them.

Scores of single examples reveal private text, so they stay at the site: only their sums are sent, shown or logged.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from umbel.messages import Evaluation
from umbel.peft_dir import replace_durably

Clusters = npt.NDArray[np.int32]
RECORD = np.dtype([("loss", "<f8"), ("tokens", "<i4"), ("exact", "?")])
"""Type of one example's record in a file of scores."""


@dataclass(frozen=True, eq=False)
class Scores:
    """One entry for each example, in the order of the set; `repr` does not show them."""

    loss: npt.NDArray[np.float64] = field(repr=False)
    """[examples], loss summed over the tokens of the answer, in nats; of a pair, as in `paired`."""
    tokens: npt.NDArray[np.int32] = field(repr=False)
    """[examples], number of tokens of the answer; 1 for a pair."""
    exact: npt.NDArray[np.bool_] = field(repr=False)
    """[examples], true if every token of the answer is the arg max, as greedy decoding would give it; or if the chosen
    answer of a pair is more likely than the rejected one."""
    pairs: bool = field(default=False, repr=False)
    """True if the examples are pairs of answers. Not in a file of scores."""
    clusters: Clusters | None = field(default=None, repr=False)
    """[examples], number of the group of examples that ask the same; None: each is alone. Not in a file of scores."""

    def __len__(self) -> int:
        return len(self.loss)

    def grouped(self, clusters: Sequence[int] | None) -> Self:
        """Return the same scores in clusters: for each example the number of its own; None: each is alone."""
        return replace(self, clusters=None if clusters is None else np.asarray(clusters, np.int32))

    def paired(self) -> Self:
        """Return the scores [examples / 2] of pairs of answers, from those of the chosen and the rejected ones in turn.

        With the margin m = log π(chosen) − log π(rejected), summed over the tokens of the answers, the loss of a pair
        is −log σ(m): Bradley and Terry's (Biometrika 39, 1952), and DPO's (arXiv 2305.18290) without a reference.
        """
        margin = self.loss[1::2] - self.loss[0::2]
        ones = np.ones(len(margin), np.int32)
        with np.errstate(invalid="ignore"):  # a loss that is no number stays one
            loss = np.logaddexp(0.0, -margin)
        return replace(self, loss=loss, tokens=ones, exact=margin > 0, pairs=True)

    def by_cluster(self, *columns: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Return [columns, clusters]: columns [examples] summed over the examples of each cluster.

        Raises ValueError where the clusters are those of other examples.
        """
        of = np.arange(len(self)) if self.clusters is None else self.clusters
        return np.array([np.bincount(of, column.astype(np.float64)) for column in columns])

    @property
    def sums(self) -> Evaluation:
        """The sums over all examples, which may leave the site."""
        return Evaluation(
            loss_sum=float(self.loss.sum()),
            loss_tokens=int(self.tokens.sum()),
            exact=int(self.exact.sum()),
            examples=len(self),
            pairs=self.pairs,
        )

    def write(self, path: Path) -> None:
        """Replace the file by one `.npy` array of records."""
        records = np.empty(len(self), RECORD)
        records["loss"], records["tokens"], records["exact"] = self.loss, self.tokens, self.exact
        buffer = io.BytesIO()
        np.save(buffer, records, allow_pickle=False)
        replace_durably(path, buffer.getvalue())

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file that `write` wrote; raise OSError or ValueError if it is missing or damaged."""
        records = np.load(path, allow_pickle=False)
        return cls(records["loss"], records["tokens"], records["exact"])


def effective_size(weights: Sequence[float] | npt.NDArray[Any]) -> float:
    """Return how many equal weights tell as much as these: (Σw)² / Σw² (Kish, Survey Sampling, 1965); 0 without any."""
    values = np.asarray(weights, np.float64)
    return float(values.sum() ** 2 / (values @ values)) if values.any() else 0.0
