"""A step in pieces computes what was announced, and differentiates no more than it must."""

import itertools
import math
from pathlib import Path

import pytest

from serving.cotrainer.trainer import LoraTrainer
from tests.toys.serving.peft_loop import (
    CUT,
    MICRO_BATCH,
    SEQ_LEN,
    assert_equal_to_peft,
    build,
    plan,
    ragged_rows,
)
from umbel.token_file import TokenFile


@pytest.fixture(scope="module")
def data() -> TokenFile:
    return ragged_rows()


@pytest.fixture(scope="module")
def trainer(tiny_llama: Path) -> LoraTrainer:
    return build(tiny_llama)


@pytest.mark.parametrize("modules", [("down_proj",), ("q_proj",), ("v_proj", "up_proj")])
def test_what_is_below_the_first_adapted_module_is_not_differentiated(
    tiny_llama: Path, data: TokenFile, modules: tuple[str, ...]
) -> None:
    trainer = build(tiny_llama, target_modules=modules)
    assert_equal_to_peft(tiny_llama, trainer, plan(), data, modules)
    kinds = [quantum.kind for quantum in trainer.rehearse(MICRO_BATCH, SEQ_LEN)]
    layers, parts = len(trainer.layers), math.ceil(MICRO_BATCH / CUT.attention_rows)
    attention_of_layer_0 = any(module in ("q_proj", "v_proj") for module in modules)
    assert kinds.count("attention_backward") == parts * (layers if attention_of_layer_0 else layers - 1)


def test_each_quantum_is_announced_before_it_runs(trainer: LoraTrainer, data: TokenFile) -> None:
    """Between two announcements torch computes the quantum that the first of them named."""
    trainer.pieces = CUT
    work: list[tuple[str, int]] = []
    layer, model = trainer.layers[0], trainer.model
    handles = [
        layer.self_attn.o_proj.register_forward_hook(lambda *io: work.append(("attention", io[2][..., 0].numel()))),
        layer.mlp.register_forward_hook(lambda *io: work.append(("mlp", io[2][..., 0].numel()))),
        model.lm_head.register_forward_hook(lambda *io: work.append(("head", io[2][..., 0].numel()))),
    ]
    announced, done = None, set[str]()
    for quantum in itertools.chain(trainer.rehearse(MICRO_BATCH, SEQ_LEN), [None]):
        assert all(announced is not None and what == (announced.kind, announced.tokens) for what in work)
        done.update(kind for kind, _ in work)
        work.clear()
        announced = quantum
    for handle in handles:
        handle.remove()
    assert done == {"attention", "mlp", "head"}
