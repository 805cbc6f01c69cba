"""`Objective`: says which rows a step trains on, and how much the loss of each counts; here supervised fine-tuning.

Shapes as in `serving.cotrainer.pieces`; E is the number of rows of a step.
"""

from collections.abc import Callable, Generator, Sequence

import numpy as np
import torch

from serving.cotrainer.quantum import Quanta, Quantum
from umbel.errors import TrainingError
from umbel.messages import TrainPlan
from umbel.token_file import NO_LOSS, TokenFile

Score = Callable[[Sequence[int]], Generator[Quantum, None, torch.Tensor]]
"""Runs the quanta that score rows of the token file with the adapter in the buffers. Returns [E, 3], float64: the sum
of the losses of a row's answer tokens (nats), the number of wrong ones among them, and their number."""
Weighed = Generator[Quantum, None, tuple[torch.Tensor, torch.Tensor | None]]
"""Quanta that return at their end the weight of each row's summed loss in the gradient, [E] in fp32, and the loss of
the step, 0-d; None where that is the sum of the losses of its answer tokens."""


class Objective:
    """The mean loss of the answer tokens of a step: supervised fine-tuning. An example is one row.

    >>> objective = Objective(plan, data)
    >>> rows = objective.rows(course.draw(plan.batch_size, objective.knows))
    """

    def __init__(self, plan: TrainPlan, data: TokenFile) -> None:
        self._plan, self._data = plan, data

    def prepare(self, ahead: Callable[[], list[int]], score: Score, spent: Callable[[], float]) -> Quanta:
        """Compute what the parent says of the examples that will be drawn, which `ahead` returns.

        The parent is in the buffers. `spent` returns the share of the plan's seconds that is over.
        """
        yield from ()

    def knows(self, example: int) -> bool:
        """Return whether an example may be drawn."""
        return True

    def rows(self, examples: list[int]) -> list[int]:
        """Return the rows of some examples in the token file."""
        return examples

    def weigh(self, rows: list[int], score: Score, device: torch.device) -> Weighed:
        """Say how much each of the rows of a step counts."""
        yield from ()
        return even_weights(len(rows), loss_tokens(self._data, rows), device), None


def examples_in(plan: TrainPlan, data: TokenFile) -> int:
    """Return the number of a token file's examples; raise TrainingError if an objective of pairs has no pairs there."""
    if plan.objective == "sft":
        return len(data)
    if len(data) % 2:
        raise TrainingError(f"{data.path}: {len(data)} rows are no pairs; prepare the data again")
    return len(data) // 2


def loss_tokens(data: TokenFile, rows: list[int]) -> int:
    """Count the tokens of some rows that carry a loss."""
    return int(np.count_nonzero(data.labels[rows, 1:] != NO_LOSS))


@torch.inference_mode(mode=False)
def even_weights(rows: int, tokens: int, device: torch.device) -> torch.Tensor:
    """Return weights [E] with which the losses of all `tokens` of some rows make a mean."""
    return torch.full((rows,), 1 / max(1, tokens), device=device)
