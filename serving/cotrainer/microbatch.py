"""`MicroBatch`: rows of a token file on the trainer's device, with the tokens of them that carry a loss.

Shapes as in `serving.cotrainer.pieces`; T is the length of the longest row.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from umbel.token_file import NO_LOSS, TokenFile


@dataclass(frozen=True)
class Answers:
    """Tokens of a micro-batch that carry a loss; position t predicts token t + 1. All tensors are [M]."""

    index: torch.Tensor
    """Positions that predict them, in the micro-batch flattened to [N]."""
    rows: torch.Tensor
    """Row of the micro-batch that each one belongs to."""
    targets: torch.Tensor
    """Their token ids."""

    @property
    def count(self) -> int:
        return len(self.index)

    def part(self, at: int, size: int) -> "Answers":
        """Return at most `size` of them, from number `at` on."""
        if size >= self.count:
            return self
        some = slice(at, at + size)
        return Answers(self.index[some], self.rows[some], self.targets[some])


@dataclass(frozen=True)
class MicroBatch:
    """Rows that are computed together."""

    ids: torch.Tensor
    """[B, T], cut to the longest row; causal attention never looks at the padding behind a shorter one."""
    answers: Answers

    @classmethod
    @torch.inference_mode(mode=False)  # its tensors are used in backward passes
    def of(cls, data: TokenFile, rows: list[int], device: torch.device) -> "MicroBatch":
        """Read rows of `data`. Sizes that depend on their content are computed on the host: no device is waited for."""
        longest = int(data.lengths[rows].max())
        labels = torch.as_tensor(data.labels[rows, :longest])
        row, position = (labels[:, 1:] != NO_LOSS).nonzero(as_tuple=True)
        answers = Answers(
            index=sent(row * longest + position, device),
            rows=sent(row, device),
            targets=sent(labels[row, position + 1].long(), device),
        )
        return cls(sent(torch.as_tensor(data.ids[rows, :longest]).long(), device), answers)


def epochs(rows: int, seed: int) -> Iterator[int]:
    """Yield row numbers without end, each epoch in a new order, from a generator of its own."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(rows, generator=generator).tolist()


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor of the host to `device`; from pinned memory the host does not wait for the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
