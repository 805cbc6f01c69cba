"""The trainer's view of a base in 4 bits: transformers' numbers, the engine's memory, and peft's training."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts.tools.packed_base import reference
from serving.cotrainer.base_view import engine_storages, frozen_tensors, view_of
from serving.cotrainer.trainer import LoraTrainer
from serving.four_bit.linear import FourBitLinear
from serving.four_bit.weight import OFFSETS, FourBitWeight
from tests.toys.serving import peft_loop
from tests.toys.serving.peft_loop import CUTS, assert_equal_to_peft, plan, ragged_rows
from tests.toys.serving.served_model import fused
from umbel.base.shapes import LINEARS, linear_shapes
from umbel.errors import UnsupportedModel


@torch.no_grad()
def test_logits_equal_those_of_transformers(packed: Path) -> None:
    ids = torch.randint(8, 400, (2, 12), generator=torch.Generator().manual_seed(0))
    theirs = reference(packed, torch.float32)
    ours = view_of(fused(packed), str(packed))
    assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)


def test_every_tensor_is_the_engines(packed: Path) -> None:
    """Bytes, scales, scales of scales and codes: the promise "one base" covers all of them."""
    served = fused(packed)
    storages = engine_storages(served)
    view = view_of(served, str(packed))
    layers = [module for module in view.modules() if isinstance(module, FourBitLinear)]
    assert len(layers) == 7 * view.config.num_hidden_layers
    tensors = frozen_tensors(view)
    assert len(tensors) > 5 * len(layers)
    assert {tensor.untyped_storage().data_ptr() for tensor in tensors.values()} == storages


def test_linears_and_their_scales_take_at_most_030_of_what_they_take_in_bf16(packed: Path) -> None:
    served = fused(packed)
    taken = sum(
        tensor.untyped_storage().nbytes()
        for parameter in served.parameters()
        for shard in FourBitWeight.shards(parameter)
        for name, tensor in shard.scale_tensors.items()
        if name not in ("code", "code2")  # codes are the same 16 and 256 numbers for all
    ) + sum(parameter.numel() for parameter in served.parameters() if parameter.dtype == torch.uint8)
    dense = 2 * sum(n * k for n, k in linear_shapes(packed, LINEARS).values())
    assert 0.25 < taken / dense < 0.30


@pytest.mark.parametrize(("cut", "objective"), [*((cut, "sft") for cut in CUTS), ("cut", "dpo")])
def test_five_steps_equal_a_plain_qlora_loop(packed: Path, cut: str, objective: str) -> None:
    """fp32, as tests/serving/cotrainer/test_trainer.py says it of a dense base; and no byte of the base changes."""
    served = fused(packed)
    before = {name: weight.clone() for name, weight in served.named_parameters()}
    trainer = LoraTrainer(
        view_of(served, str(packed)), target_modules=LINEARS, max_rank=peft_loop.MAX_RANK,
        seq_len=peft_loop.SEQ_LEN, pieces=CUTS[cut],
    )  # fmt: skip
    for _ in trainer.warm_up():
        pass
    assert_equal_to_peft(packed, trainer, plan(objective=objective), ragged_rows())
    assert all(torch.equal(weight, before[name]) for name, weight in served.named_parameters())


def test_a_part_that_is_not_there_is_refused_by_name(packed: Path) -> None:
    served = fused(packed)
    weight = served.get_parameter("model.layers.1.mlp.gate_up_proj.base_layer.weight")
    setattr(weight, OFFSETS, getattr(weight, OFFSETS).clamp(max=100))
    with pytest.raises(UnsupportedModel, match=r"^model.layers.1.mlp.gate_proj.weight: the engine holds"):
        view_of(served, str(packed))


def test_a_dense_base_is_trained_without_bitsandbytes(tiny_llama: Path) -> None:
    """peft would import it where it is installed, for seconds, and ask the network."""
    script = (
        "import sys\n"
        "from transformers import AutoConfig, AutoModelForCausalLM\n"
        "from serving.cotrainer.quantum import Pieces\n"
        "from serving.cotrainer.trainer import LoraTrainer\n"
        f"model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained({str(tiny_llama)!r}))\n"
        "sizes = {'max_rank': 4, 'seq_len': 8, 'pieces': Pieces.whole(1, 8)}\n"
        "for _ in LoraTrainer(model, target_modules=('q_proj', 'up_proj'), **sizes).warm_up():\n"
        "    pass\n"
        "assert 'bitsandbytes' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[3])
