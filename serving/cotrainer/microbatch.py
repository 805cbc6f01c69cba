"""Rows of a token file on the trainer's device, and which of their tokens carry a loss.

Shapes: B rows, T tokens of the longest, M answer tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from umbel.token_file import NO_LOSS, TokenFile


@dataclass(frozen=True)
class Answers:
    """The tokens of a micro-batch that carry a loss: position t predicts token t + 1. All tensors are [M]."""

    index: torch.Tensor
    """Where they are predicted, in the micro-batch flattened to [B · T]."""
    rows: torch.Tensor
    targets: torch.Tensor

    @property
    def count(self) -> int:
        return len(self.index)

    def part(self, at: int, size: int) -> "Answers":
        if size >= self.count:
            return self
        some = slice(at, at + size)
        return Answers(self.index[some], self.rows[some], self.targets[some])


@dataclass(frozen=True)
class MicroBatch:
    """ids: [B, T], cut to the longest row; causal attention never looks at the padding behind it."""

    ids: torch.Tensor
    answers: Answers

    @classmethod
    @torch.inference_mode(mode=False)  # what it makes is used in backward passes
    def of(cls, data: TokenFile, rows: list[int], device: torch.device) -> "MicroBatch":
        """Read rows of `data`. What depends on their content is computed before they are sent: no device waits."""
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
    """Row numbers, each epoch in a new order of its own generator."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(rows, generator=generator).tolist()


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on `device`; from pinned memory the copy needs no wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
