"""Compares the training throughput in quanta with that of plain peft loops: ABBA blocks, CPU and wall time.

Two plain loops: `peft` is what one writes first (labels given to the model, AdamW as it comes); `peft, lean` computes
logits of answer tokens only and uses the fused AdamW, as the quanta do, so what is left is the price of the cuts. The
last lines are of the same base packed in 4 bits (nf4), against it as it is.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import torch.nn.functional as F
import transformers

from serving.bench.intervals import mean_ratio
from serving.cotrainer.progress import Progress
from serving.cotrainer.quantum import Pieces
from serving.cotrainer.trainer import LoraTrainer
from serving.four_bit.library import bitsandbytes
from serving.four_bit.linear import FourBitLinear
from serving.four_bit.weight import FourBitWeight
from umbel.base.shapes import LINEARS
from umbel.messages import TrainPlan
from umbel.token_file import NO_LOSS, TokenFile

RANK = 8
MODELS = {
    "tiny": (64, 160, 2, 4, 2, 512), "demo": (256, 640, 3, 4, 2, 2048), "large": (512, 1280, 4, 8, 4, 4096),
    "smollm2": (576, 1536, 30, 9, 3, 49152),
}  # fmt: skip
"""Name → width of the hidden states and of the MLP, layers, heads, of them with keys of their own, vocabulary."""
Timed = tuple[float, float]
"""CPU seconds, wall seconds."""


@dataclass(frozen=True)
class Task:
    """The training of every loop: rows of different lengths, with a loss on their second half."""

    data: TokenFile
    steps: int
    batch_size: int
    micro_batch: int

    @property
    def plan(self) -> TrainPlan:
        """The same task as an order to the trainer."""
        return TrainPlan(rank=RANK, steps=self.steps, seconds=1e9, batch_size=self.batch_size)

    def batches(self) -> Iterator[list[int]]:
        """Yield the rows of each step, in the order in which the trainer takes them."""
        generator = torch.Generator().manual_seed(self.plan.seed)
        rows: list[int] = []
        while len(rows) < self.steps * self.batch_size:
            rows += torch.randperm(len(self.data), generator=generator).tolist()
        for step in range(self.steps):
            yield rows[step * self.batch_size : (step + 1) * self.batch_size]


def main() -> None:
    """Compare all loops on the chosen models and print a line per pair of loops."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, action="append", help="default: tiny and large")
    parser.add_argument("--pairs", type=int, default=10, help="ABBA pairs per comparison")
    parser.add_argument("--seconds", type=float, default=2.0, help="of one block, roughly")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--only-four-bit", action="store_true", help="only the lines of the packed base")
    parser.add_argument("--mlp-tokens", type=int, help="cut below the sub-blocks as well, in runs of so many tokens")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    torch.set_num_threads(1)  # CPU time of the loops is compared, which threads that wait for each other would add to
    print(f"threads {torch.get_num_threads()}, torch {torch.__version__}, peft {peft.__version__}")
    for name in options.model or ["tiny", "large"]:
        compare(name, options)


def compare(name: str, options: argparse.Namespace) -> None:
    """Time all loops on one model; blocks are as many steps as take about `options.seconds`."""
    task = Task(make_data(options.seq_len, MODELS[name][-1]), 1, 8, 4)
    whole = Pieces(task.micro_batch, task.micro_batch, task.micro_batch * options.seq_len, 1 << 20)
    cut = Pieces(task.micro_batch, 1, options.mlp_tokens or 64, options.mlp_tokens or 64)
    few = Pieces(task.micro_batch, 1, 16, 16)
    dtype = getattr(torch, options.dtype)
    trainer, packed = (
        LoraTrainer(model, max_rank=RANK, target_modules=LINEARS, seq_len=options.seq_len, pieces=whole)
        for model in (make_model(name).to(dtype), in_four_bits(make_model(name).to(dtype)))
    )
    for one in (trainer, packed):
        for _ in one.warm_up():
            pass
    loops: dict[str, Callable[[Task], None]] = {
        "quanta": quanta(trainer, whole),
        "quanta, cut finely": quanta(trainer, cut),
        "quanta, 16 tokens": quanta(trainer, few),
        "4 bits": quanta(packed, whole),
        "4 bits, cut finely": quanta(packed, cut),
        "4 bits, 16 tokens": quanta(packed, few),
    }
    pairs = [
        ("4 bits", "quanta"), ("4 bits, cut finely", "quanta, cut finely"), ("4 bits, 16 tokens", "quanta, 16 tokens"),
    ]  # fmt: skip
    if not options.only_four_bit:
        wrapped = wrap(make_model(name))
        loops |= {"peft": plain(wrapped, lean=False), "peft, lean": plain(wrapped, lean=True)}
        pairs = [("quanta", "peft"), ("quanta", "peft, lean"), ("quanta, cut finely", "peft, lean"), *pairs]
    for loop in loops.values():
        loop(task)
    began = time.perf_counter()
    loops["quanta"](Task(task.data, 4, task.batch_size, task.micro_batch))
    steps = max(2, round(options.seconds * 4 / (time.perf_counter() - began)))
    task = Task(task.data, steps, task.batch_size, task.micro_batch)
    for ours, theirs in pairs:
        found = [abba(loops[ours], loops[theirs], task) for _ in range(options.pairs)]
        report(name, ours, theirs, steps, found)


def abba(ours: Callable[[Task], None], theirs: Callable[[Task], None], task: Task) -> tuple[float, float, float]:
    """Time ours, theirs, theirs, ours.

    Returns our throughput over theirs by CPU time and by wall time, and our CPU milliseconds per step.
    """
    a, b = timed(ours, task), timed(theirs, task)
    b2, a2 = timed(theirs, task), timed(ours, task)
    return (b[0] + b2[0]) / (a[0] + a2[0]), (b[1] + b2[1]) / (a[1] + a2[1]), 500 * (a[0] + a2[0]) / task.steps


def timed(loop: Callable[[Task], None], task: Task) -> Timed:
    """Run a loop once; return its CPU seconds (this thread) and wall seconds."""
    cpu, wall = time.thread_time(), time.perf_counter()
    loop(task)
    return time.thread_time() - cpu, time.perf_counter() - wall


def report(name: str, ours: str, theirs: str, steps: int, pairs: list[tuple[float, float, float]]) -> None:
    """Print the mean ratios of all ABBA pairs, with a 95 % interval of the one by CPU time."""
    cpu, wall, milliseconds = zip(*pairs, strict=True)
    print(
        f"{name:7} {ours:18} / {theirs:18} throughput by CPU time {mean_ratio(cpu).text(3)},"
        f" by wall time {mean_ratio(wall).value:.3f};  {statistics.median(milliseconds):.1f} ms per step,"
        f" {len(pairs)} ABBA of {steps} steps",
        flush=True,
    )


def quanta(trainer: LoraTrainer, pieces: Pieces) -> Callable[[Task], None]:
    """Return the loop of umbel's trainer, cut into `pieces`."""

    def run(task: Task) -> None:
        trainer.pieces = pieces
        for _ in trainer.train(task.plan, None, task.data, Progress()):
            pass

    return run


def plain(wrapped: Any, *, lean: bool) -> Callable[[Task], None]:
    """Return the loop that one writes over a peft model; `lean` is the thrifty one of the module's docstring."""
    weights = [weight for weight in wrapped.parameters() if weight.requires_grad]

    def run(task: Task) -> None:
        plan = task.plan
        optimizer = torch.optim.AdamW(weights, lr=plan.learning_rate, weight_decay=plan.weight_decay, fused=lean)
        for rows in task.batches():
            parts = [rows[at : at + task.micro_batch] for at in range(0, len(rows), task.micro_batch)]
            batches = [make_batch(task.data, part) for part in parts]
            tokens = sum(int((labels[:, 1:] != NO_LOSS).sum()) for _, labels in batches)
            loss_sum = 0.0
            for ids, labels in batches:
                loss = answers_loss(wrapped, ids, labels) if lean else labels_loss(wrapped, ids, labels)
                (loss / tokens).backward()  # type: ignore[no-untyped-call]
                loss_sum += float(loss.detach())
            torch.nn.utils.clip_grad_norm_(weights, plan.clip_norm)
            optimizer.step()
            optimizer.zero_grad()

    return run


def make_batch(data: TokenFile, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (ids, labels), each [rows, tokens of the longest]."""
    longest = int(data.lengths[rows].max())
    return torch.as_tensor(data.ids[rows, :longest]).long(), torch.as_tensor(data.labels[rows, :longest]).long()


def labels_loss(wrapped: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the summed loss as the model computes it from labels: logits of all tokens."""
    tokens = int((labels[:, 1:] != NO_LOSS).sum())
    loss: torch.Tensor = wrapped(input_ids=ids, labels=labels, use_cache=False).loss * tokens
    return loss


def answers_loss(wrapped: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the summed loss from logits of the tokens that have one."""
    model = wrapped.base_model.model
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    rows, positions = (labels[:, 1:] != NO_LOSS).nonzero(as_tuple=True)
    logits = model.lm_head(hidden[rows, positions])
    return F.cross_entropy(logits, labels[rows, positions + 1], reduction="sum")


def make_model(name: str) -> Any:
    """Make a Llama of one of the `MODELS` with random weights, in float32."""
    hidden, inner, layers, heads, kv_heads, vocabulary = MODELS[name]
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads,
    )  # fmt: skip
    made: Any = transformers.LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
    return made.float().eval()


def in_four_bits(model: Any) -> Any:
    """Pack the linear layers of a model's blocks in nf4, in memory."""
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] in LINEARS:
            weight = module.weight.data.contiguous()
            packed = bitsandbytes().functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
            model.set_submodule(name, FourBitLinear(FourBitWeight(*packed)))
    return model


def wrap(model: Any) -> Any:
    """Put a peft adapter over all linear layers of a model."""
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(LINEARS), lora_dropout=0.0)
    return peft.get_peft_model(model, config).eval()


def make_data(seq_len: int, vocabulary: int, rows: int = 64) -> TokenFile:
    """Make rows of random tokens, half to all of `seq_len` long, with labels on their second half."""
    random = np.random.default_rng(0)
    ids = random.integers(8, vocabulary, (rows, seq_len)).astype(np.int32)
    lengths = random.integers(seq_len // 2, seq_len + 1, rows).astype(np.int32)
    labels = ids.copy()
    for row, length in enumerate(lengths):
        labels[row, : length // 2], labels[row, length:] = NO_LOSS, NO_LOSS
    return TokenFile(Path("bench"), ids, labels, lengths)


if __name__ == "__main__":
    main()
