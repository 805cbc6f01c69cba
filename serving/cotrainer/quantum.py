"""`Quantum`, `Pieces`: the units of training work and their sizes, without torch."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "open", "load", "attention", "mlp", "head", "mlp_backward", "attention_backward", "optimizer", "copy_out",
    "evaluate_attention", "evaluate_mlp", "evaluate_head",
]  # fmt: skip


@dataclass(frozen=True)
class Quantum:
    """A piece of work that cannot be interrupted."""

    kind: Kind
    tokens: int = 0
    """How many it computes; 0 where it works on the factors of one layer instead."""


Quanta = Generator[Quantum, None, None]
"""Announces each quantum before it runs: `next` does what was announced last and returns what comes then. The first
`next` only announces."""


@dataclass(frozen=True)
class Pieces:
    """The largest pieces that a training step is cut into."""

    micro_batch: int
    """Rows whose activations are held at a time."""
    attention_rows: int
    mlp_tokens: int
    head_tokens: int
    recompute: bool = False
    """Keep only the inputs of the sub-blocks, and compute forward again in the backward piece."""

    @classmethod
    def whole(cls, micro_batch: int, seq_len: int) -> "Pieces":
        """Nothing below a sub-block is cut."""
        return cls(micro_batch, micro_batch, micro_batch * seq_len, micro_batch * seq_len)
