"""Factors of one layer: the trained ones move as in peft, the others and the padding stay."""

from pathlib import Path

import pytest

from serving.cotrainer.trainer import LoraTrainer
from tests.toys.serving.peft_loop import (
    RANK,
    assert_equal_to_peft,
    build,
    distance,
    drive,
    factors_of,
    plan,
    ragged_rows,
    reference,
    train_from,
)
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
