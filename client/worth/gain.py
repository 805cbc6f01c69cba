"""`Gain`: how much lower a loss has become, on the same examples, and how sure that is."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

CONFIDENCE = 0.8
"""Of the one-sided bound. An error costs training time, or a little of the gain; what answers users is for verdicts."""
Losses = npt.NDArray[np.float64]
"""[examples], loss per token of each example, in nats."""


@dataclass(frozen=True)
class Gain:
    """A mean difference of losses, in nats per token; positive where the loss has fallen."""

    mean: float
    error: float
    """Standard error of the mean."""
    examples: int

    @classmethod
    def between(cls, before: Losses, after: Losses, weights: Losses | None = None) -> "Gain":
        """Compare the losses of the same examples, which weigh as `weights`, or alike.

        Raises ValueError for other numbers of examples.
        """
        differences = before - after
        if not len(differences):
            return cls(0.0, math.inf, 0)
        share = np.full(len(differences), 1.0) if weights is None else weights
        share = share / share.sum()
        mean = float(share @ differences)
        count = len(differences)
        if count < 2 or not math.isfinite(mean):
            return cls(mean, math.inf, count)
        error = math.sqrt(float(share**2 @ (differences - mean) ** 2) * count / (count - 1))
        return cls(mean, error, count)

    @property
    def lower(self) -> float:
        """Bound below which the true gain is only with a probability of 1 − CONFIDENCE (Student's t)."""
        if not math.isfinite(self.error) or not math.isfinite(self.mean):
            return -math.inf
        return self.mean - float(stdtrit(self.examples - 1, CONFIDENCE)) * self.error

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.error:.4f} nats per token on {self.examples} examples"
