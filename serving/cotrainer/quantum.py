"""`Quantum`, `Pieces`: the units of training work and their sizes, without torch."""

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Literal

from umbel.site.memory import HEAD_TOKENS

Kind = Literal[
    "open", "load", "step", "attention", "mlp", "head", "mlp_backward", "attention_backward", "optimizer", "copy_out",
    "evaluate_attention", "evaluate_mlp", "evaluate_head", "read_back", "swap", "checkpoint", "restore",
]  # fmt: skip
BOUNDARIES = frozenset[Kind]({"open", "step"})
"""Kinds before which nothing of a job is half done: it has not begun, or is between two optimizer steps."""


@dataclass(frozen=True)
class Quantum:
    """A piece of training work that cannot be interrupted once it runs."""

    kind: Kind
    tokens: int = 0
    """Tokens that it computes; 0 for work on the factors of one layer."""


Quanta = Generator[Quantum, None, None]
"""Generator that announces each quantum before it runs it.

Each `next` runs the quantum announced last and announces the following one; the first `next` only announces.
"""


@dataclass(frozen=True)
class Pieces:
    """Sizes that a training step is cut into; no piece is larger."""

    micro_batch: int
    """Rows whose activations are held at a time."""
    attention_rows: int
    """Rows of a piece of attention, which cannot be cut within a row."""
    mlp_tokens: int
    head_tokens: int
    recompute: bool = False
    """Keep only the inputs of sub-blocks, and compute forward again in the backward piece: less memory, more time."""

    @classmethod
    def whole(cls, micro_batch: int, seq_len: int) -> "Pieces":
        """Return sizes with which every sub-block runs over the whole micro-batch in one piece."""
        tokens = micro_batch * seq_len
        return cls(micro_batch, micro_batch, tokens, min(tokens, HEAD_TOKENS))

    def within(self, rung: "Pieces") -> "Pieces":
        """Return these sizes with no more rows than `rung` has, and recomputed if it is."""
        rows = min(self.micro_batch, rung.micro_batch)
        return replace(
            self,
            micro_batch=rows,
            attention_rows=min(self.attention_rows, rows),
            recompute=self.recompute or rung.recompute,
        )

    def smaller(self) -> "Pieces | None":
        """Return the rung below: fewer rows, a power of two; then one row recomputed; None where there is none."""
        if self.micro_batch > 1:
            return self.within(replace(self, micro_batch=1 << (self.micro_batch - 1).bit_length() - 1))
        return None if self.recompute else replace(self, recompute=True)
