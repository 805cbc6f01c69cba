"""`Objective`: says which rows a step trains on, and how much the loss of each counts; here supervised fine-tuning.

Shapes as in `serving.cotrainer.pieces`; E is the number of rows of a step.
"""

from collections.abc import Callable, Generator, Sequence

import numpy as np
import torch

from serving.cotrainer.quantum import Quanta, Quantum
from umbel.messages import TrainPlan
from umbel.token_file import NO_LOSS, TokenFile

Score = Callable[[Sequence[int]], Generator[Quantum, None, torch.Tensor]]
"""Runs the quanta that score rows of the token file with the adapter in the buffers. Returns [E, 3], float64: the sum
of the losses of a row's answer tokens (nats), the number of wrong ones among them, and their number."""
Draw = Callable[[int], list[int]]
"""Returns the numbers of so many examples that come next (`serving.cotrainer.checkpoints.course`)."""
Weighed = Generator[Quantum, None, tuple[torch.Tensor, torch.Tensor | None]]
"""Quanta that return at their end the weight of each row's summed loss in the gradient, [E] in fp32, and the loss of
the step, 0-d; None where that is the sum of the losses of its answer tokens."""


class Objective:
    """The mean loss of the answer tokens of a step: supervised fine-tuning. An example is one row.

    >>> objective = Objective(plan, data, course.draw)
    >>> rows = objective.draw()
    """

    def __init__(self, plan: TrainPlan, data: TokenFile, draw: Draw) -> None:
        self._plan, self._data = plan, data
        self._draw = draw

    def prepare(self, score: Score, spent: Callable[[], float]) -> Quanta:
        """Compute what the parent says of the rows that will be drawn, while it is in the buffers.

        `spent` returns the share of the plan's seconds that is over.
        """
        yield from ()

    def draw(self) -> list[int]:
        """Return the rows of the next step."""
        return self._draw(self._plan.batch_size)

    def weigh(self, rows: list[int], score: Score, device: torch.device) -> Weighed:
        """Say how much each of the rows of a step counts."""
        yield from ()
        return even_weights(len(rows), loss_tokens(self._data, rows), device), None


def loss_tokens(data: TokenFile, rows: list[int]) -> int:
    """Count the tokens of some rows that carry a loss."""
    return int(np.count_nonzero(data.labels[rows, 1:] != NO_LOSS))


@torch.inference_mode(mode=False)
def even_weights(rows: int, tokens: int, device: torch.device) -> torch.Tensor:
    """Return weights [E] with which the losses of all `tokens` of some rows make a mean."""
    return torch.full((rows,), 1 / max(1, tokens), device=device)
