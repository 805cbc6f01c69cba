"""Factors of one layer: the trained ones move as in peft, the others and the padding stay."""

from functools import partial
from pathlib import Path
from typing import cast

import peft
import pytest
import torch
import transformers

from serving.cotrainer.lora import KeptLinear
from serving.cotrainer.trainer import LoraTrainer
from tests.toys.serving.peft_loop import (
    CUT,
    MAX_RANK,
    RANK,
    SEQ_LEN,
    assert_equal_to_peft,
    build,
    copied,
    distance,
    drive,
    factors_of,
    plan,
    ragged_rows,
    reference,
    train_from,
)
from umbel.base.shapes import LINEARS
from umbel.token_file import TokenFile


@pytest.fixture(scope="module")
def data() -> TokenFile:
    return ragged_rows()


@pytest.fixture(scope="module")
def trainer(tiny_llama: Path) -> LoraTrainer:
    return build(tiny_llama)


@pytest.mark.parametrize("factors", ["A", "B"])
def test_one_factor_is_trained_and_the_other_stays(
    tiny_llama: Path, trainer: LoraTrainer, data: TokenFile, factors: str
) -> None:
    other = {"A": "B", "B": "A"}[factors]
    assert_equal_to_peft(tiny_llama, trainer, plan(factors=factors), data, frozen=f".lora_{other}.", tolerance=3e-5)
    for layer in trainer.factors:
        for pair in layer.pairs.values():
            assert pair["AB".index(other)].grad is None, "no gradient work for what is not trained"


def test_proximal_term_is_part_of_the_loss(tiny_llama: Path, trainer: LoraTrainer, data: TokenFile) -> None:
    """FedProx: its gradient is clipped with the rest; one that is strong holds the adapter at its parent."""
    trained = assert_equal_to_peft(tiny_llama, trainer, plan(proximal=0.5), data)
    start = factors_of(reference(tiny_llama, trained_before=True))
    strong = train_from(trainer, plan(proximal=1e6, steps=20, clip_norm=1e9), start, data)
    free = train_from(trainer, plan(steps=20, clip_norm=1e9), start, data)
    assert distance(strong, start) < distance(free, start)
    assert distance(trained, start) > 0


def test_padding_to_the_largest_rank_stays_zero(trainer: LoraTrainer, tiny_llama: Path, data: TokenFile) -> None:
    drive(trainer, plan(), factors_of(reference(tiny_llama)), data)
    for layer in trainer.factors:
        for a_ri, b_or in layer.pairs.values():
            assert not a_ri[RANK:].any()
            assert not b_or[:, RANK:].any()


def test_who_was_parked_before_any_step_comes_back_without_moments(tiny_llama: Path, data: TokenFile) -> None:
    """Of a trainer that nothing was calibrated on, as one without an engine."""
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    fresh = LoraTrainer(base, target_modules=LINEARS, max_rank=MAX_RANK, seq_len=SEQ_LEN, pieces=CUT)
    start = factors_of(reference(tiny_llama, trained_before=True))
    for _ in fresh.load(start.__getitem__):
        pass
    parked = [layer.park() for layer in fresh.factors]
    another = train_from(fresh, plan(), start, data)
    assert distance(another, start) > 0
    for layer, kept in zip(fresh.factors, parked, strict=True):
        layer.resume(kept)
        assert not any(moment.any() for state in layer.optimizer.state.values() for moment in state.values())
    assert distance(copied(fresh), start) == 0


@pytest.fixture(scope="module")
def layers() -> tuple[peft.tuners.lora.Linear, KeptLinear]:
    """peft's layer and ours, with the same weights in bf16 and the same factors in fp32."""
    torch.manual_seed(0)
    base = torch.nn.Linear(48, 32).bfloat16()
    theirs, ours = torch.nn.Sequential(base), torch.nn.Sequential(base)
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=4, target_modules=["0"]), theirs)
    KeptLinear.put_into(ours, ["0"], 4)
    for name, weight in ours.named_parameters():
        weight.requires_grad_("lora" in name)
        if "lora" in name:
            weight.data = torch.randn_like(weight.data.float())
        theirs.get_parameter(name).data = weight.data.clone()
        theirs.get_parameter(name).requires_grad_("lora" in name)
    assert [name for name, _ in theirs.named_modules()] == [name for name, _ in ours.named_modules()]
    return cast(peft.tuners.lora.Linear, theirs[0]), cast(KeptLinear, ours[0])


def _note(kept: list[torch.Tensor], one: torch.Tensor) -> torch.Tensor:
    kept.append(one)
    return one


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_computes_what_pefts_computes_and_keeps_its_input_as_it_is(
    layers: tuple[peft.tuners.lora.Linear, KeptLinear], dtype: torch.dtype
) -> None:
    """Of peft's layer autograd keeps the input in fp32; the results are the same numbers."""
    found = []
    for layer in layers:
        layer.base_layer.to(dtype)
        torch.manual_seed(1)
        x = torch.randn(2, 5, 48, dtype=dtype).requires_grad_()
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(partial(_note, kept), lambda one: one):
            y = layer(x)
        y.backward(torch.randn(2, 5, 32, dtype=dtype))
        assert y.dtype == dtype
        inputs = {one.dtype for one in kept if one.numel() == x.numel()}
        weights = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        found.append((inputs, [y.detach(), x.grad, *(weight.grad for weight in weights)]))
        for weight in weights:
            weight.grad = None
    (their_inputs, theirs), (our_inputs, ours) = found
    assert (their_inputs, our_inputs) == ({torch.float32}, {dtype})
    # In bf16 peft adds two roundings of the input's gradient, ours adds the same two: one unit in the last place.
    for one, other in zip(theirs, ours, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5 if dtype is torch.float32 else 2**-7, atol=1e-5)
