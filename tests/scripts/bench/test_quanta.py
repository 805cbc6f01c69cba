"""The loops that the quanta are compared with: they compute the same loss, on the rows that the trainer takes."""

import torch

from scripts.tools.bench.quanta import (
    MODELS,
    Task,
    abba,
    answers_loss,
    in_four_bits,
    labels_loss,
    make_batch,
    make_data,
    make_model,
    wrap,
)
from serving.four_bit.linear import FourBitLinear
from umbel.token_file import NO_LOSS


def test_both_plain_loops_have_the_same_loss() -> None:
    data = make_data(16, MODELS["tiny"][-1], rows=4)
    wrapped = wrap(make_model("tiny"))
    ids, labels = make_batch(data, [0, 1, 2])
    assert ids.shape == labels.shape == (3, int(data.lengths[:3].max()))
    whole, lean = labels_loss(wrapped, ids, labels), answers_loss(wrapped, ids, labels)
    torch.testing.assert_close(lean, whole, rtol=1e-4, atol=1e-4)


def test_half_of_each_row_has_a_loss() -> None:
    data = make_data(32, 512)
    for row, length in enumerate(data.lengths):
        assert 16 <= length <= 32
        assert (data.labels[row] != NO_LOSS).sum() == length - length // 2


def test_every_row_comes_once_before_one_comes_again() -> None:
    task = Task(make_data(16, 512, rows=8), steps=4, batch_size=4, micro_batch=2)
    rows = [row for batch in task.batches() for row in batch]
    assert sorted(rows[:8]) == sorted(rows[8:]) == list(range(8))


def test_a_loop_that_does_half_the_work_has_twice_the_throughput() -> None:
    def spin(times: int) -> None:
        total = torch.zeros(256, 256)
        for _ in range(times):
            total = total @ total

    task = Task(make_data(16, 512, rows=8), steps=2, batch_size=4, micro_batch=2)
    spin(20)
    cpu, _, milliseconds = abba(lambda task: spin(40), lambda task: spin(160), task)
    assert cpu > 1.5
    assert milliseconds > 0


def test_a_packed_model_has_all_linear_layers_of_its_blocks_in_four_bits() -> None:
    model = in_four_bits(make_model("tiny"))
    packed = [name for name, module in model.named_modules() if isinstance(module, FourBitLinear)]
    assert len(packed) == 7 * model.config.num_hidden_layers
    assert not any("head" in name for name in packed)
