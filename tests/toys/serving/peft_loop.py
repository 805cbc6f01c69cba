"""`assert_equal_to_peft`: a plain peft training loop, to whose result the trainer's quanta are compared."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import torch.nn.functional as F
import transformers

from scripts.tools.packed_base import reference as transformers_model
from serving.cotrainer.lora import Factors
from serving.cotrainer.progress import Progress
from serving.cotrainer.quantum import Pieces
from serving.cotrainer.trainer import LoraTrainer
from umbel.base.shapes import LINEARS
from umbel.messages import TrainPlan
from umbel.token_file import NO_LOSS, TokenFile

RANK, MAX_RANK, ROWS, SEQ_LEN, MICRO_BATCH = 4, 8, 16, 24, 4


def ragged_rows() -> TokenFile:
    """Make rows of different lengths with a loss on their second half."""
    generator = np.random.default_rng(0)
    ids = generator.integers(8, 400, (ROWS, SEQ_LEN)).astype(np.int32)
    lengths = generator.integers(12, SEQ_LEN + 1, ROWS).astype(np.int32)
    labels = ids.copy()
    for row, length in enumerate(lengths):
        labels[row, : length // 2], labels[row, length:] = NO_LOSS, NO_LOSS
    return TokenFile(Path("test"), ids, labels, lengths)


WHOLE = Pieces(micro_batch=MICRO_BATCH, attention_rows=MICRO_BATCH, mlp_tokens=MICRO_BATCH * SEQ_LEN, head_tokens=1000)


CUT = Pieces(micro_batch=MICRO_BATCH, attention_rows=3, mlp_tokens=17, head_tokens=16)


CUTS = {
    "whole": WHOLE,
    "cut": CUT,
    "recomputed": replace(CUT, recompute=True),
    "recomputed whole": replace(WHOLE, recompute=True),
}


def build(model: Path, pieces: Pieces = CUT, target_modules: tuple[str, ...] = LINEARS) -> LoraTrainer:
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    made = LoraTrainer(base, target_modules=target_modules, max_rank=MAX_RANK, seq_len=SEQ_LEN, pieces=pieces)
    for _ in made.warm_up():
        pass
    return made


def plan(**changes: Any) -> TrainPlan:
    fields: dict[str, Any] = {"rank": RANK, "steps": 5, "seconds": 1e6, "batch_size": 2 * MICRO_BATCH, "seed": 3}
    return TrainPlan(**{**fields, "learning_rate": 1e-3, "weight_decay": 0.01, **changes})


def reference(model: Path, modules: tuple[str, ...] = LINEARS, trained_before: bool = False) -> Any:
    torch.manual_seed(1)
    base = transformers_model(model, torch.float32)
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(modules), lora_dropout=0.0)
    wrapped = peft.get_peft_model(base, config).eval()
    for name, weight in wrapped.named_parameters():
        if trained_before and ".lora_B." in name:
            torch.nn.init.normal_(weight, std=0.02)
    return wrapped


def factors_of(wrapped: Any) -> Factors:
    """Return module path → (A, B) of a peft model."""
    named = {name: weight.detach().clone() for name, weight in wrapped.named_parameters() if ".lora_" in name}
    modules = {name.removeprefix("base_model.model.").split(".lora_")[0] for name in named}
    key = "base_model.model.{}.lora_{}.default.weight"
    return {module: (named[key.format(module, "A")], named[key.format(module, "B")]) for module in modules}


def assert_equal_to_peft(
    model: Path,
    trainer: LoraTrainer,
    order: TrainPlan,
    data: TokenFile,
    modules: tuple[str, ...] = LINEARS,
    frozen: str = "nothing",
    tolerance: float = 1e-5,
) -> Factors:
    """Train both, compare the factors, and return the trainer's."""
    wrapped = reference(model, modules, trained_before=order.factors != "AB" or order.proximal > 0)
    start = factors_of(wrapped)
    batches = drive(trainer, order, start, data)
    trained = copied(trainer)
    weights = [weight for name, weight in wrapped.named_parameters() if weight.requires_grad and frozen not in name]
    parents = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW(weights, lr=order.learning_rate, weight_decay=order.weight_decay)
    with torch.no_grad():
        reference_logs = log_probabilities(wrapped, data, list(range(len(data))))
    for step, rows in enumerate(batches):
        if order.objective == "dpo":
            ratios = log_probabilities(wrapped, data, rows) - reference_logs[rows]
            (-F.logsigmoid(order.beta * (ratios[0::2] - ratios[1::2]))).mean().backward()  # TRL's `sigmoid`
        else:
            tokens = int((data.labels[rows, 1:] != NO_LOSS).sum())
            for part in (slice(0, MICRO_BATCH), slice(MICRO_BATCH, None)):
                (-log_probabilities(wrapped, data, rows[part]).sum() / tokens).backward()
        if order.proximal:
            pairs = zip(weights, parents, strict=True)
            (order.proximal / 2 * sum(((weight - parent) ** 2).sum() for weight, parent in pairs)).backward()
        torch.nn.utils.clip_grad_norm_(weights, order.clip_norm)
        optimizer.param_groups[0]["lr"] = rate(order, step)
        optimizer.step()
        optimizer.zero_grad()
    expected = factors_of(wrapped)
    assert trained.keys() == expected.keys()
    # AdamW divides by the gradient's size, so of the smallest ones the rounding shows, here a hundredth of a step.
    assert distance(trained, expected) < tolerance
    assert distance(expected, start) > 1e-3, "it has learned something"
    return trained


def log_probabilities(wrapped: Any, data: TokenFile, rows: list[int]) -> torch.Tensor:
    """Return the log-probability of the answer in each of some rows, [rows]."""
    ids, labels = torch.tensor(data.ids[rows]).long(), torch.tensor(data.labels[rows]).long()
    logits = wrapped(input_ids=ids).logits[:, :-1]
    return -F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], ignore_index=NO_LOSS, reduction="none").sum(1)


def distance(one: Factors, other: Factors) -> float:
    """Return the largest difference of any two elements."""
    return max(float((a - b).abs().max()) for m in one for a, b in zip(one[m], other[m], strict=True))


def train_from(trainer: LoraTrainer, order: TrainPlan, start: Factors, data: TokenFile) -> Factors:
    drive(trainer, order, start, data)
    return copied(trainer)


def copied(trainer: LoraTrainer) -> Factors:
    into: Factors = {}
    for _ in trainer.copy_out(RANK, into):
        pass
    return into


def drive(trainer: LoraTrainer, order: TrainPlan, start: Factors, data: TokenFile) -> list[list[int]]:
    """Train; return the rows of each step in the trainer's order."""
    for _ in trainer.train(order, start.__getitem__, data, Progress()):
        pass
    if order.objective == "dpo":
        return [[row for pair in batch for row in (2 * pair, 2 * pair + 1)] for batch in epochs(order)]
    return epochs(order)


def epochs(order: TrainPlan) -> list[list[int]]:
    """Return the numbers of the examples, rows or pairs, of each step."""
    examples, count = ROWS // 2 if order.objective == "dpo" else ROWS, order.steps * order.batch_size
    generator, drawn = torch.Generator().manual_seed(order.seed), list[int]()
    while len(drawn) < count:
        drawn += torch.randperm(examples, generator=generator).tolist()
    return [drawn[at : at + order.batch_size] for at in range(0, count, order.batch_size)]


def rate(order: TrainPlan, step: int) -> float:
    """Return the learning rate of a step: linear warm-up, then constant or half a cosine."""
    if step < order.warmup_steps:
        return order.learning_rate * (step + 1) / order.warmup_steps
    if order.schedule == "constant":
        return order.learning_rate
    done = (step - order.warmup_steps) / (order.steps - order.warmup_steps)
    return order.learning_rate * (1 + float(np.cos(np.pi * done))) / 2
