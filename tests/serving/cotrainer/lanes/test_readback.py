"""What is read back from a CPU is not copied."""

import torch

from serving.cotrainer.lanes.readback import Readback


def test_a_readback_on_a_cpu_is_the_tensor_itself() -> None:
    values = torch.ones(3, requires_grad=True)
    read = Readback(values).read()
    assert read.data_ptr() == values.data_ptr()
    assert not read.requires_grad
