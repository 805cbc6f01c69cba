"""The trainer's quanta compute what an ordinary peft loop computes, and leave no trace on the thread they run on."""

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers

from serving.cotrainer.lora import Factors
from serving.cotrainer.quantum import Pieces
from serving.cotrainer.trainer import LoraTrainer, Progress
from serving.scores import Scores
from umbel.base import LINEARS
from umbel.errors import TrainingError
from umbel.messages import TrainPlan
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
    made.warm_up()
    return made


def plan(**changes: Any) -> TrainPlan:
    fields: dict[str, Any] = {"rank": RANK, "steps": 5, "seconds": 1e6, "batch_size": 2 * MICRO_BATCH, "seed": 3}
    return TrainPlan(**{**fields, "learning_rate": 1e-3, "weight_decay": 0.01, **changes})


def reference(model: Path, modules: tuple[str, ...] = LINEARS, trained_before: bool = False) -> Any:
    torch.manual_seed(1)
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(modules), lora_dropout=0.0)
    wrapped = peft.get_peft_model(base, config).eval()
    for name, weight in wrapped.named_parameters():
        if trained_before and ".lora_B." in name:
            torch.nn.init.normal_(weight, std=0.02)
    return wrapped


def factors_of(wrapped: Any) -> Factors:
    """Module path → (A, B) of a peft model."""
    named = {name: weight.detach().clone() for name, weight in wrapped.named_parameters() if ".lora_" in name}
    modules = {name.removeprefix("base_model.model.").split(".lora_")[0] for name in named}
    key = "base_model.model.{}.lora_{}.default.weight"
    return {module: (named[key.format(module, "A")], named[key.format(module, "B")]) for module in modules}


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


def test_each_quantum_is_announced_before_it_runs(trainer: LoraTrainer, data: TokenFile) -> None:
    """What was computed between two announcements is what the first of them said."""
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


def assert_equal_to_peft(
    model: Path,
    trainer: LoraTrainer,
    order: TrainPlan,
    data: TokenFile,
    modules: tuple[str, ...] = LINEARS,
    frozen: str = "nothing",
    tolerance: float = 1e-5,
) -> Factors:
    """Train both; return what the trainer made."""
    wrapped = reference(model, modules, trained_before=order.factors != "AB" or order.proximal > 0)
    start = factors_of(wrapped)
    batches = drive(trainer, order, start, data)
    trained = copied(trainer)
    weights = [weight for name, weight in wrapped.named_parameters() if weight.requires_grad and frozen not in name]
    parents = [weight.detach().clone() for weight in weights]
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


def distance(one: Factors, other: Factors) -> float:
    """The largest difference of any two numbers."""
    return max(float((a - b).abs().max()) for m in one for a, b in zip(one[m], other[m], strict=True))


def train_from(trainer: LoraTrainer, order: TrainPlan, start: Factors, data: TokenFile) -> Factors:
    drive(trainer, order, start, data)
    return copied(trainer)


def copied(trainer: LoraTrainer) -> Factors:
    into: Factors = {}
    for _ in trainer.copy_out(RANK, into, torch.float32):
        pass
    return into


def test_padding_to_the_largest_rank_stays_zero(trainer: LoraTrainer, tiny_llama: Path, data: TokenFile) -> None:
    drive(trainer, plan(), factors_of(reference(tiny_llama)), data)
    for layer in trainer.factors:
        for a_ri, b_or in layer.pairs.values():
            assert not a_ri[RANK:].any()
            assert not b_or[:, RANK:].any()


def test_grad_mode_and_random_numbers_are_left_alone(trainer: LoraTrainer, tiny_llama: Path, data: TokenFile) -> None:
    start = factors_of(reference(tiny_llama))
    state, results = torch.get_rng_state(), list[Scores]()
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
