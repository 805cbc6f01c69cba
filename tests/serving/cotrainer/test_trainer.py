"""The trainer's quanta compute what an ordinary peft loop computes, and leave no trace on the thread they run on."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from serving.cotrainer.lora import LayerFactors
from serving.cotrainer.progress import Progress
from serving.cotrainer.trainer import LoraTrainer
from serving.scores import Scores
from tests.toys.serving.peft_loop import (
    CUTS,
    MICRO_BATCH,
    RANK,
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
from umbel.token_file import NO_LOSS, TokenFile


@pytest.fixture(scope="module")
def data() -> TokenFile:
    return ragged_rows()


@pytest.fixture(scope="module")
def trainer(tiny_llama: Path) -> LoraTrainer:
    return build(tiny_llama)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_five_steps_equal_a_plain_peft_loop(
    tiny_llama: Path, trainer: LoraTrainer, data: TokenFile, schedule: str, cut: str
) -> None:
    """fp32, five AdamW steps, accumulation 2, clipping: LoRA parameters equal to 1e-5, however the step is cut."""
    trainer.pieces = CUTS[cut]
    assert_equal_to_peft(tiny_llama, trainer, plan(schedule=schedule, warmup_steps=1), data)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_every_family_is_cut_alike(request: pytest.FixtureRequest, data: TokenFile, family: str) -> None:
    model: Path = request.getfixturevalue(f"tiny_{family}")
    assert_equal_to_peft(model, build(model), plan(), data)


def test_grad_mode_and_random_numbers_are_left_alone(trainer: LoraTrainer, tiny_llama: Path, data: TokenFile) -> None:
    start = factors_of(reference(tiny_llama))
    state, results = torch.get_rng_state(), list[Scores]()
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            before = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
            for generator in (
                trainer.train(plan(steps=1), start.__getitem__, data, Progress()),
                trainer.copy_out(RANK, {}),
                trainer.evaluate(start.__getitem__, data, results),
            ):
                for _ in generator:
                    assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
                    assert torch.equal(torch.get_rng_state(), state)


def test_the_base_is_never_written(trainer: LoraTrainer, tiny_llama: Path, data: TokenFile) -> None:
    before = {name: weight.clone() for name, weight in trainer.frozen.items()}
    drive(trainer, plan(learning_rate=0.1), factors_of(reference(tiny_llama)), data)
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.frozen.items())
    assert all(weight.grad is None for weight in trainer.frozen.values())


def test_evaluation_equals_the_reference_example_by_example(
    trainer: LoraTrainer, tiny_llama: Path, data: TokenFile
) -> None:
    wrapped = reference(tiny_llama)
    torch.nn.init.normal_(
        wrapped.get_submodule("base_model.model.model.layers.0.mlp.down_proj").lora_B["default"].weight
    )
    labels = torch.tensor(data.labels[:]).long()
    with torch.no_grad():
        logits = wrapped(input_ids=torch.tensor(data.ids[:]).long()).logits[:, :-1]
    labels[::3] = torch.where(labels[::3] == NO_LOSS, NO_LOSS, F.pad(logits.argmax(-1), (1, 0))[::3])  # answered right
    asked = replace(data, labels=labels.numpy().astype(np.int32))
    results: list[Scores] = []
    for _ in trainer.evaluate(factors_of(wrapped).__getitem__, asked, results):
        pass
    answers = labels[:, 1:]
    loss_et = F.cross_entropy(logits.transpose(1, 2), answers, ignore_index=NO_LOSS, reduction="none")
    right_et = (logits.argmax(-1) == answers) | (answers == NO_LOSS)
    (scores,) = results
    assert scores.loss == pytest.approx(loss_et.sum(1).numpy(), rel=1e-4)
    assert scores.tokens.tolist() == (answers != NO_LOSS).sum(1).tolist()
    assert scores.exact.tolist() == right_et.all(1).tolist()
    assert 0 < scores.sums.exact < scores.sums.examples == ROWS
    assert scores.sums.loss_sum == pytest.approx(loss_et.sum().item(), rel=1e-4)


def test_a_round_ends_at_its_deadline_with_what_it_applied(trainer: LoraTrainer, data: TokenFile) -> None:
    now, progress = [0.0], Progress()
    for _ in trainer.train(plan(steps=1000, seconds=10), None, data, progress, elapsed=lambda: now[0]):
        now[0] += 0.5
    assert 1 <= progress.steps < 1000
    assert progress.examples == progress.steps * 2 * MICRO_BATCH


def test_a_loss_that_is_not_finite_stops_the_job(trainer: LoraTrainer, tiny_llama: Path, data: TokenFile) -> None:
    with pytest.raises(TrainingError, match="learning rate"):
        drive(trainer, plan(steps=50, learning_rate=1e30), factors_of(reference(tiny_llama)), data)


@pytest.mark.parametrize(("busy", "steps"), [(0.0, 10), (2.0, 5)])
def test_a_cosine_ends_with_the_steps_or_the_seconds(
    trainer: LoraTrainer, tiny_llama: Path, data: TokenFile, monkeypatch: pytest.MonkeyPatch, busy: float, steps: int
) -> None:
    """A site that its users keep at 2 s a step has half of the steps, and its rate falls twice as fast."""
    now, rates = [0.0], []

    def step(self: LayerFactors, clip: torch.Tensor, rate: float, decay: float) -> None:
        rates.append(rate)
        now[0] += busy / len(trainer.factors)

    monkeypatch.setattr(LayerFactors, "step", step)
    order = plan(steps=10, seconds=10.0, schedule="cosine", learning_rate=1.0)
    for _ in trainer.train(order, factors_of(reference(tiny_llama)).__getitem__, data, Progress(), lambda: now[0]):
        pass
    wanted = [0.5 * (1 + math.cos(math.pi * number / steps)) for number in range(steps)]
    assert rates[:: len(trainer.factors)] == pytest.approx(wanted)
