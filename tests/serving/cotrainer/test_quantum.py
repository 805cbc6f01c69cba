"""Pieces that are whole cut nothing: one quantum for each sub-block, forward and backward."""

from collections import Counter
from pathlib import Path

import pytest

from serving.cotrainer.quantum import Pieces, Quantum
from tests.toys.serving.peft_loop import build
from umbel.site.memory import HEAD_TOKENS

ROWS, TOKENS = 3, 20


def test_whole_pieces_are_one_quantum_per_sub_block(tiny_llama: Path) -> None:
    trainer = build(tiny_llama, Pieces.whole(ROWS, TOKENS))
    layers, quanta = len(trainer.layers), list(trainer.rehearse(ROWS, TOKENS))
    assert Counter(quantum.kind for quantum in quanta) == {
        "step": 1, "attention": layers, "mlp": layers, "head": 1, "mlp_backward": layers,
        "attention_backward": layers, "optimizer": layers,
    }  # fmt: skip
    sizes = {quantum.kind: quantum.tokens for quantum in quanta}
    assert sizes.pop("head") == ROWS * (TOKENS - 1), "the first token of a row is not predicted"
    assert sizes.pop("optimizer") == sizes.pop("step") == 0, "they compute no tokens"
    assert set(sizes.values()) == {ROWS * TOKENS}


@pytest.mark.parametrize(("rows", "seq_len"), [(1, 16), (8, 128)])
def test_whole_pieces_are_as_large_as_the_micro_batch_but_for_the_heads_logits(rows: int, seq_len: int) -> None:
    pieces = Pieces.whole(rows, seq_len)
    assert (pieces.micro_batch, pieces.attention_rows) == (rows, rows)
    assert pieces.mlp_tokens == rows * seq_len
    assert pieces.head_tokens == min(rows * seq_len, HEAD_TOKENS)
    assert not pieces.recompute


def test_rungs_go_down_to_one_row_that_is_recomputed() -> None:
    pieces: Pieces | None = Pieces(6, 5, 100, 50)
    seen = []
    while pieces is not None:
        seen.append((pieces.micro_batch, pieces.attention_rows, pieces.recompute))
        assert (pieces.mlp_tokens, pieces.head_tokens) == (100, 50)
        pieces = pieces.smaller()
    assert seen == [(6, 5, False), (4, 4, False), (2, 2, False), (1, 1, False), (1, 1, True)]


def test_sizes_within_a_rung_keep_what_is_smaller() -> None:
    assert Pieces(4, 2, 9, 9).within(Pieces(2, 1, 1, 1, recompute=True)) == Pieces(2, 2, 9, 9, recompute=True)
    assert Pieces(1, 1, 9, 9, recompute=True).within(Pieces(2, 2, 1, 1)) == Pieces(1, 1, 9, 9, recompute=True)


def test_a_quantum_is_known_by_kind_and_size() -> None:
    assert Quantum("mlp", 64) == Quantum("mlp", 64) != Quantum("mlp", 32)
    assert Quantum("load").tokens == 0
