"""`MicroBatch`: rows of a token file on the trainer's device, with the tokens of them that carry a loss.

Shapes as in `serving.cotrainer.pieces`; T is the length of the longest row, or the next of a few lengths above it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
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
    """[B, T]; causal attention never looks at the padding behind a shorter row."""
    answers: Answers

    @classmethod
    @torch.inference_mode(mode=False)  # its tensors are used in backward passes
    def of(cls, data: TokenFile, rows: list[int], device: torch.device, lengths: Sequence[int] = ()) -> "MicroBatch":
        """Read rows of `data`, padded to the first of `lengths` that holds the longest; without any, to the longest.

        Sizes that depend on their content are computed on the host: no device is waited for.
        """
        longest = int(data.lengths[rows].max())
        longest = min(next((length for length in lengths if length >= longest), longest), data.seq_len)
        labels = torch.as_tensor(data.labels[rows, :longest])
        row, position = (labels[:, 1:] != NO_LOSS).nonzero(as_tuple=True)
        answers = Answers(
            index=sent(row * longest + position, device),
            rows=sent(row, device),
            targets=sent(labels[row, position + 1].long(), device),
        )
        return cls(sent(torch.as_tensor(data.ids[rows, :longest]).long(), device), answers)

    def shaped(self, hidden: torch.Tensor, block: str) -> torch.Tensor:
        """View hidden states as a sub-block takes them: [B, T, H] for attention, [N, H] for the MLP."""
        return hidden.view(-1, hidden.shape[-1]) if block == "mlp" else hidden.view(*self.ids.shape, -1)


def made_up(rows: int, tokens: int) -> TokenFile:
    """Return `rows` × `tokens` tokens that all have a loss."""
    ids = np.zeros((rows, tokens), np.int32)
    return TokenFile(Path("rehearsal"), ids, ids, np.full(rows, tokens, np.int32))


def row_lengths(seq_len: int) -> tuple[int, ...]:
    """Return the lengths that rows are padded to on a GPU, four to a doubling: 16, 20, 24, 28, 32, 40, … seq_len.

    A device's allocator reuses blocks of a size that it has seen, so only sizes may occur that were rehearsed. A row
    grows by an eighth on average; without them there would be a size for each number of tokens.
    """
    steps = (quarter << power for power in range(2, seq_len.bit_length()) for quarter in (4, 5, 6, 7))
    return (*(length for length in steps if length < seq_len), seq_len)


def groups(rows: list[int], size: int) -> list[list[int]]:
    """Cut a list into groups of `size`, and what is left into powers of two, so that few numbers of rows occur."""
    found = []
    while rows:
        count = size if len(rows) >= size else 1 << len(rows).bit_length() - 1
        found.append(rows[:count])
        rows = rows[count:]
    return found


def epochs(rows: int, seed: int, drawn: int = 0) -> Iterator[int]:
    """Yield row numbers without end, each epoch in a new order, from a generator of its own, behind `drawn` of them."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(drawn // rows):
        torch.randperm(rows, generator=generator)
    yield from torch.randperm(rows, generator=generator).tolist()[drawn % rows :]
    while True:
        yield from torch.randperm(rows, generator=generator).tolist()


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor of the host to `device`; from pinned memory the host does not wait for the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
