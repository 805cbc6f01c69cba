"""The trainer's quanta compute what an ordinary peft loop computes, and leave no trace on the thread they run on."""

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers

from serving.trainer import Factors, LoraTrainer, Progress
from umbel.base import LINEARS
from umbel.errors import TrainingError
from umbel.messages import Evaluation, TrainPlan
from umbel.token_file import NO_LOSS, TokenFile

RANK, MAX_RANK, ROWS, SEQ_LEN, MICRO_BATCH = 4, 8, 16, 24, 4


@pytest.fixture(scope="module")
def data() -> TokenFile:
    """Rows of different lengths, a loss on their second half."""
    generator = np.random.default_rng(0)
    ids = generator.integers(8, 400, (ROWS, SEQ_LEN)).astype(np.int32)
    lengths = generator.integers(12, SEQ_LEN + 1, ROWS).astype(np.int32)
    labels = ids.copy()
    for row, length in enumerate(lengths):
        labels[row, : length // 2], labels[row, length:] = NO_LOSS, NO_LOSS
    return TokenFile(Path("test"), ids, labels, lengths)


@pytest.fixture(scope="module")
def trainer(tiny_llama: Path) -> LoraTrainer:
    return build(tiny_llama)


def build(model: Path, **changes: int) -> LoraTrainer:
    sizes = {"max_rank": MAX_RANK, "micro_batch": MICRO_BATCH, "seq_len": SEQ_LEN, "head_tokens": 16, **changes}
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    made = LoraTrainer(base, target_modules=LINEARS, **sizes)
    made.warm_up()
    return made


def plan(**changes: Any) -> TrainPlan:
    fields: dict[str, Any] = {"rank": RANK, "steps": 5, "seconds": 1e6, "batch_size": 2 * MICRO_BATCH, "seed": 3}
    return TrainPlan(**{**fields, "learning_rate": 1e-3, "weight_decay": 0.01, **changes})


def reference(model: Path) -> Any:
    torch.manual_seed(1)
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(LINEARS), lora_dropout=0.0)
    return peft.get_peft_model(base, config).eval()


def factors_of(wrapped: Any) -> Factors:
    """Module path → (A, B) of a peft model."""
    named = {name: weight.detach().clone() for name, weight in wrapped.named_parameters() if weight.requires_grad}
    modules = {name.removeprefix("base_model.model.").split(".lora_")[0] for name in named}
    key = "base_model.model.{}.lora_{}.default.weight"
    return {module: (named[key.format(module, "A")], named[key.format(module, "B")]) for module in modules}


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_five_steps_equal_a_plain_peft_loop(
    tiny_llama: Path, trainer: LoraTrainer, data: TokenFile, schedule: str
) -> None:
    """Issue Show D: fp32, five AdamW steps, accumulation 2, clipping: LoRA parameters equal to 1e-5."""
    wrapped = reference(tiny_llama)
    start = factors_of(wrapped)
    order = plan(schedule=schedule, warmup_steps=1)
    batches = drive(trainer, order, start, data)
    trained: Factors = {}
    for _ in trainer.copy_out(RANK, trained, torch.float32):
        pass

    weights = [weight for weight in wrapped.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=order.learning_rate, weight_decay=order.weight_decay)
    for step, rows in enumerate(batches):
        ids, labels = torch.tensor(data.ids[rows]).long(), torch.tensor(data.labels[rows]).long()
        tokens = int((labels[:, 1:] != NO_LOSS).sum())
        for part in (slice(0, MICRO_BATCH), slice(MICRO_BATCH, None)):
            logits = wrapped(input_ids=ids[part]).logits[:, :-1]
            loss = F.cross_entropy(
                logits.flatten(0, 1), labels[part, 1:].flatten(), ignore_index=NO_LOSS, reduction="sum"
            )
            (loss / tokens).backward()
        torch.nn.utils.clip_grad_norm_(weights, order.clip_norm)
        optimizer.param_groups[0]["lr"] = rate(order, step)
        optimizer.step()
        optimizer.zero_grad()

    expected = factors_of(wrapped)
    assert trained.keys() == expected.keys()
    for module, (a_ri, b_or) in expected.items():
        assert (trained[module][0] - a_ri).abs().max() < 1e-5
        assert (trained[module][1] - b_or).abs().max() < 1e-5
    assert max(float((expected[m][1] - start[m][1]).abs().max()) for m in start) > 1e-3, "it has learned something"


def test_padding_to_the_largest_rank_stays_zero(trainer: LoraTrainer, tiny_llama: Path, data: TokenFile) -> None:
    drive(trainer, plan(), factors_of(reference(tiny_llama)), data)
    for layer in trainer.lora:
        for a_ri, b_or in layer.values():
            assert not a_ri[RANK:].any()
            assert not b_or[:, RANK:].any()


def test_grad_mode_and_random_numbers_are_left_alone(trainer: LoraTrainer, tiny_llama: Path, data: TokenFile) -> None:
    start = factors_of(reference(tiny_llama))
    state, results = torch.get_rng_state(), list[Evaluation]()
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            before = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
            for generator in (
                trainer.train(plan(steps=1), start.__getitem__, data, Progress()),
                trainer.copy_out(RANK, {}, torch.bfloat16),
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


def test_evaluation_equals_the_reference(trainer: LoraTrainer, tiny_llama: Path, data: TokenFile) -> None:
    wrapped = reference(tiny_llama)
    torch.nn.init.normal_(
        wrapped.get_submodule("base_model.model.model.layers.0.mlp.down_proj").lora_B["default"].weight
    )
    results: list[Evaluation] = []
    for _ in trainer.evaluate(factors_of(wrapped).__getitem__, data, results):
        pass
    labels = torch.tensor(data.labels[:]).long()
    with torch.no_grad():
        logits = wrapped(input_ids=torch.tensor(data.ids[:]).long()).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=NO_LOSS, reduction="sum")
    right = (logits.argmax(-1) == labels[:, 1:]) | (labels[:, 1:] == NO_LOSS)
    assert results[0].loss_sum == pytest.approx(loss.item(), rel=1e-4)
    assert results[0].loss_tokens == int((labels[:, 1:] != NO_LOSS).sum())
    assert (results[0].exact, results[0].examples) == (int(right.all(1).sum()), ROWS)


def test_a_round_ends_at_its_deadline_with_what_it_applied(trainer: LoraTrainer, data: TokenFile) -> None:
    now, progress = [0.0], Progress()
    for _ in trainer.train(plan(steps=1000, seconds=10), None, data, progress, clock=lambda: now[0]):
        now[0] += 0.5
    assert 1 <= progress.steps < 1000
    assert progress.examples == progress.steps * 2 * MICRO_BATCH


def test_a_loss_that_is_not_finite_stops_the_job(trainer: LoraTrainer, tiny_llama: Path, data: TokenFile) -> None:
    with pytest.raises(TrainingError, match="learning rate"):
        drive(trainer, plan(steps=50, learning_rate=1e30), factors_of(reference(tiny_llama)), data)


def drive(trainer: LoraTrainer, order: TrainPlan, start: Factors, data: TokenFile) -> list[list[int]]:
    """Train; the rows of each step, as the trainer took them."""
    for _ in trainer.train(order, start.__getitem__, data, Progress()):
        pass
    rows = epochs(order.seed, order.steps * order.batch_size)
    return [rows[at : at + order.batch_size] for at in range(0, len(rows), order.batch_size)]


def epochs(seed: int, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    rows: list[int] = []
    while len(rows) < count:
        rows += torch.randperm(ROWS, generator=generator).tolist()
    return rows[:count]


def rate(order: TrainPlan, step: int) -> float:
    """Linear warm-up, then constant or half a cosine."""
    if step < order.warmup_steps:
        return order.learning_rate * (step + 1) / order.warmup_steps
    if order.schedule == "constant":
        return order.learning_rate
    done = (step - order.warmup_steps) / (order.steps - order.warmup_steps)
    return order.learning_rate * (1 + float(np.cos(np.pi * done))) / 2
