"""Adapters in memory: truncations and changes."""

import ml_dtypes
import torch

from strategies.adapter import Adapter, change, factors_of
from strategies.lowrank import LowRank
from tests.toys.adapters import adapter


def test_a_truncation_is_the_same_bytes_every_time_and_can_be_trained() -> None:
    parent = adapter(0, dtype=ml_dtypes.bfloat16)
    again = Adapter.of(parent.blob, parent.base)
    assert parent.at_rank(2).digest == again.at_rank(2).digest
    assert parent.at_rank(3) is parent
    untrained = {name: 0 * array if "lora_B" in name else array for name, array in parent.tensors.items()}
    for module, one in adapter(untrained).at_rank(2).factors.items():
        assert torch.equal(one.A, factors_of(untrained)[module].A[:2])  # not zero, or nothing would ever be learnt
        assert not one.B.any()


def test_a_change_has_no_gauge() -> None:
    """The rules measure ΔW − ΔW_received, as one low-rank product."""
    one, other = (LowRank(torch.randn(5, 2), torch.randn(2, 4)) for _ in range(2))
    assert torch.allclose(change(one, other).dense(), one.dense() - other.dense(), atol=1e-5)
