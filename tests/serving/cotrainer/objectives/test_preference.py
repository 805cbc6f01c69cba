"""Steps by pairs are those of a plain peft loop with TRL's loss, however they are cut and whatever is beside them."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from serving.cotrainer.progress import Progress
from serving.cotrainer.trainer import LoraTrainer
from tests.toys.serving.peft_loop import (
    CUT,
    CUTS,
    ROWS,
    assert_equal_to_peft,
    build,
    drive,
    factors_of,
    plan,
    ragged_rows,
    reference,
)
from umbel.errors import TrainingError
from umbel.messages import TrainPlan
from umbel.token_file import NO_LOSS, TokenFile

PAIRS = 3
"""Pairs of a step: six rows, in micro-batches of four and two, or less."""


@pytest.fixture(scope="module")
def data() -> TokenFile:
    return ragged_rows()


@pytest.fixture
def trainer(tiny_llama: Path) -> LoraTrainer:
    return build(tiny_llama)


def by_pairs(**changes: object) -> TrainPlan:
    return plan(**{"objective": "dpo", "beta": 0.5, "batch_size": PAIRS, **changes})


@pytest.mark.parametrize("rows", [1, 3, 4])
@pytest.mark.parametrize("cut", CUTS)
def test_five_steps_equal_a_plain_loop(
    tiny_llama: Path, trainer: LoraTrainer, data: TokenFile, cut: str, rows: int
) -> None:
    """With a pair in two micro-batches, with one row and a half, and with two."""
    trainer.pieces = replace(CUTS[cut], micro_batch=rows, attention_rows=min(rows, CUTS[cut].attention_rows))
    assert_equal_to_peft(tiny_llama, trainer, by_pairs(), data)


@pytest.mark.parametrize("factors", ["A", "B"])
def test_one_factor_is_trained(tiny_llama: Path, trainer: LoraTrainer, data: TokenFile, factors: str) -> None:
    other = {"A": "B", "B": "A"}[factors]
    frozen = f".lora_{other}."
    assert_equal_to_peft(tiny_llama, trainer, by_pairs(factors=factors), data, frozen=frozen, tolerance=3e-5)


def test_from_an_adapter_that_is_pulled_to(tiny_llama: Path, trainer: LoraTrainer, data: TokenFile) -> None:
    """The reference is the parent, and not the base; FedProx's term is beside the loss."""
    assert_equal_to_peft(tiny_llama, trainer, by_pairs(proximal=0.5), data)


def test_what_is_counted(tiny_llama: Path, trainer: LoraTrainer, data: TokenFile) -> None:
    """Pairs as examples; the tokens of both answers; and a first loss of log 2, for the adapter is its reference."""
    progress = Progress()
    for _ in trainer.train(by_pairs(steps=1), factors_of(reference(tiny_llama)).__getitem__, data, progress):
        pass
    (rows,) = drive(trainer, by_pairs(steps=1), factors_of(reference(tiny_llama)), data)
    assert (progress.steps, progress.examples, progress.tokens) == (1, PAIRS, data.lengths[rows].sum())
    assert progress.loss_tokens == np.count_nonzero(data.labels[rows, 1:] != NO_LOSS)
    assert progress.loss_sum == pytest.approx(PAIRS * math.log(2))


def test_a_step_costs_one_forward_pass_more_and_the_reference_one_for_each_pair(
    tiny_llama: Path, trainer: LoraTrainer, data: TokenFile
) -> None:
    """Counted in tokens of the head: each pair is drawn, and scored once under the parent and once before its step."""
    work = dict.fromkeys(("head", "evaluate_head"), 0)
    order = by_pairs(steps=2, batch_size=ROWS // 4)
    for quantum in trainer.train(order, factors_of(reference(tiny_llama)).__getitem__, data, Progress()):
        if quantum.kind in work:
            work[quantum.kind] += quantum.tokens
    assert work == {"head": data.loss_tokens(), "evaluate_head": 2 * data.loss_tokens()}


def test_pairs_for_whose_reference_there_was_no_time_are_not_drawn(
    tiny_llama: Path, trainer: LoraTrainer, data: TokenFile
) -> None:
    """The clock says that a fifth of the seconds is over once the pairs of one step are scored."""
    now, progress = [0.0], Progress()
    order = by_pairs(steps=4, seconds=10.0, batch_size=2)
    start = factors_of(reference(tiny_llama)).__getitem__
    for quantum in trainer.train(order, start, data, progress, lambda: now[0]):
        if quantum.kind == "evaluate_head":
            now[0] = 2.0
    first = drive(trainer, order, factors_of(reference(tiny_llama)), data)[0]
    assert progress.steps == 4
    assert progress.tokens == 4 * data.lengths[first].sum(), "the same two pairs each time"


def test_want_of_memory_while_pairs_are_scored_costs_rows_and_changes_nothing(
    tiny_llama: Path, trainer: LoraTrainer, data: TokenFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enough_for = tmp_path / "enough"
    enough_for.write_text("2")
    monkeypatch.setenv("UMBEL_SCARCE_MEMORY", str(enough_for))
    assert_equal_to_peft(tiny_llama, trainer, by_pairs(), data)
    assert trainer.pieces.micro_batch == 2 < CUT.micro_batch


def test_rows_that_are_no_pairs_are_refused(tiny_llama: Path, trainer: LoraTrainer, data: TokenFile) -> None:
    odd = TokenFile(data.path, data.ids[1:], data.labels[1:], data.lengths[1:])
    with pytest.raises(TrainingError, match="15 rows are no pairs"):
        drive(trainer, by_pairs(), factors_of(reference(tiny_llama)), odd)


def test_a_loss_that_is_not_finite_stops_the_job(trainer: LoraTrainer, tiny_llama: Path, data: TokenFile) -> None:
    with pytest.raises(TrainingError, match="learning rate"):
        drive(trainer, by_pairs(steps=50, learning_rate=1e30), factors_of(reference(tiny_llama)), data)
