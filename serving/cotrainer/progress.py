"""`Progress`: work of a training job so far; `Applied`: an optimizer step whose loss is on its way to the host."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from serving.cotrainer.lanes.readback import Readback
from umbel.errors import TrainingError


@dataclass
class Progress:
    """Work of a training job so far. The trainer adds to it after each step; others read it."""

    steps: int = 0
    examples: int = 0
    """Rows, or pairs of rows where the objective is of pairs."""
    tokens: int = 0
    """Tokens in the rows of those steps, without padding."""
    loss_tokens: int = 0
    """Tokens in them that carry a loss."""
    loss_sum: float = 0.0
    """Sum of the losses of those, in nats; where the objective is of pairs, sum of the losses of the pairs."""
    busy_s: float = 0.0
    """Seconds of its quanta."""
    before_s: float = 0.0
    """Seconds that the job had taken at the checkpoint from which it went on; 0 without one."""

    def stopwatch(self) -> Callable[[], float]:
        """Return a function that tells the seconds since now, and those of before."""
        began = time.monotonic()
        return lambda: self.before_s + time.monotonic() - began

    def go_on_from(self, earlier: Mapping[str, int | float]) -> None:
        """Count on from the fields of an earlier one; the quanta of this job so far stay counted."""
        busy_s = self.busy_s
        vars(self).update(earlier)
        self.busy_s += busy_s


@dataclass(frozen=True)
class Applied:
    """An optimizer step that was applied, its loss on its way to the host."""

    step: int
    examples: int
    tokens: int
    loss_tokens: int
    loss: Readback

    def book(self, progress: Progress) -> None:
        """Add the step to `progress`. Raises TrainingError for a loss that is not finite."""
        loss = float(self.loss.read())
        if not math.isfinite(loss):
            raise TrainingError(f"the loss is {loss} at step {self.step}; lower the learning rate")
        progress.steps += 1
        progress.examples += self.examples
        progress.tokens += self.tokens
        progress.loss_tokens += self.loss_tokens
        progress.loss_sum += loss
