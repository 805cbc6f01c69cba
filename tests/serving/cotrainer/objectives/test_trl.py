"""The trainer's steps by pairs are those of TRL's DPOTrainer: losses and factors."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from serving.cotrainer.progress import Progress
from tests.toys.serving.peft_loop import build, copied, distance, factors_of, plan, reference
from umbel.messages import TrainPlan
from umbel.token_file import NO_LOSS, TokenFile

PAIRS = 6


def test_three_steps_equal_those_of_trl(tiny_llama: Path, tmp_path: Path) -> None:
    """fp32, AdamW steps on all pairs, from an adapter that was trained before: it is the reference. Equal to 1e-6."""
    order = plan(objective="dpo", beta=0.3, steps=3, batch_size=PAIRS)
    wrapped = reference(tiny_llama, trained_before=True)
    start = factors_of(wrapped)
    theirs = dpo_trainer(wrapped, tiny_llama, order, tmp_path)
    theirs.train()
    expected = factors_of(wrapped)
    losses = [said["loss"] for said in theirs.state.log_history if "loss" in said]

    trainer, progress = build(tiny_llama), Progress()
    data = token_file(theirs.train_dataset)
    sums = [progress.loss_sum for _ in trainer.train(order, start.__getitem__, data, progress)]
    sums = list(dict.fromkeys([*sums, progress.loss_sum]))
    assert np.diff(sums) / PAIRS == pytest.approx(losses, abs=1e-4)
    assert losses[-1] < losses[0] == pytest.approx(np.log(2))
    assert distance(copied(trainer), expected) < 1e-6 < 1e-3 < distance(expected, start)


def dpo_trainer(wrapped: Any, model: Path, order: TrainPlan, folder: Path) -> Any:
    """Return TRL's trainer of a peft model, whose reference is a copy of the adapter as it is now."""
    import trl  # takes seconds
    from datasets import Dataset

    pairs = [
        {"prompt": f"question {n} is", "chosen": f" good {7 * n}", "rejected": f" bad, and {n} worse"}
        for n in range(PAIRS)
    ]
    config = trl.DPOConfig(
        output_dir=str(folder), beta=order.beta, max_steps=order.steps, per_device_train_batch_size=PAIRS,
        learning_rate=order.learning_rate, lr_scheduler_type="constant", weight_decay=order.weight_decay,
        max_grad_norm=order.clip_norm, optim="adamw_torch", bf16=False, gradient_checkpointing=False, use_cpu=True,
        logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    return trl.DPOTrainer(wrapped, args=config, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer)


def token_file(pairs: Any) -> TokenFile:
    """Return TRL's own tokens of pairs, chosen and rejected in turn."""
    rows = [(one["prompt_ids"], one[answer]) for one in pairs for answer in ("chosen_ids", "rejected_ids")]
    lengths = np.array([len(prompt) + len(answer) for prompt, answer in rows], np.int32)
    ids = np.zeros((len(rows), lengths.max()), np.int32)
    labels = np.full_like(ids, NO_LOSS)
    for row, (prompt, answer) in enumerate(rows):
        ids[row, : lengths[row]] = [*prompt, *answer]
        labels[row, len(prompt) : lengths[row]] = answer
    return TokenFile(Path("test"), ids, labels, lengths)
