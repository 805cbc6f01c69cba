"""LoRA training and evaluation as generators of quanta: the smallest pieces that cannot be interrupted.

Whoever drives a generator decides when the next quantum runs: the scheduler hooks, between two iterations of a busy
engine, or a plain `for` loop. Gradients are those of an ordinary backward pass: each layer runs forward on a detached
input and is differentiated alone, the gradient handed from layer to layer. Before every yield grad mode is back as it
was, and no random number is ever drawn from torch's global generator.

Shapes: B micro-batch rows, T tokens, H hidden, V vocabulary, N answer tokens in a head quantum, R rank.
"""

import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from umbel.errors import TrainingError
from umbel.messages import Evaluation, TrainPlan
from umbel.token_file import NO_LOSS, TokenFile

Label = Literal["load", "forward", "head", "backward", "optimizer", "copy_out", "evaluate"]
Quanta = Generator[Label, None, None]
Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Module path → (A [R, in], B [out, R])."""
ReadFactors = Callable[[str], tuple[torch.Tensor, torch.Tensor]]


@dataclass
class Progress:
    """What a training job has done so far; read by whoever reports on it."""

    steps: int = 0
    examples: int = 0
    loss_tokens: int = 0
    loss_sum: float = 0.0


@contextmanager
def differentiable() -> Iterator[None]:
    """Grad mode for one quantum; the engine's own mode (no_grad, maybe inference_mode) is back afterwards."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


class LoraTrainer:
    """Trains one adapter at a time over a frozen causal LM. Everything it will ever need is allocated here.

    The buffers hold `max_rank`; an adapter of a lower rank lies in their first rows, the rest is zero and stays zero:
    a pair of zero row and zero column gets no gradient, so the padding never changes the result.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_rank: int,
        target_modules: tuple[str, ...],
        micro_batch: int,
        seq_len: int,
        head_tokens: int,
    ) -> None:
        self.model = model
        self.micro_batch, self.seq_len, self.head_tokens = micro_batch, seq_len, head_tokens
        window = (
            getattr(model.config, "sliding_window", None) if getattr(model.config, "use_sliding_window", True) else None
        )
        if window and seq_len > window:
            raise TrainingError(f"[training].seq_len = {seq_len} is longer than the base's sliding window of {window}")
        self.frozen = dict(model.named_parameters())
        # alpha == r: adapters travel in canonical form, their scaling folded into the factors.
        lora = LoraConfig(r=max_rank, lora_alpha=max_rank, target_modules=list(target_modules), lora_dropout=0.0)
        inject_adapter_in_model(lora, model)
        for parameter in self.frozen.values():
            parameter.requires_grad_(False)
        self.layers: list[torch.nn.Module] = list(model.model.layers)
        self.lora = [_lora_of(layer, f"model.layers.{index}") for index, layer in enumerate(self.layers)]
        self.parameters = [[weight for pair in layer.values() for weight in pair] for layer in self.lora]
        for weight in [weight for weights in self.parameters for weight in weights]:
            weight.data = weight.data.float()  # fp32 master copy, whatever the base computes in
        self.optimizers = [torch.optim.AdamW(weights, lr=0.0) for weights in self.parameters]

    @property
    def state_bytes(self) -> int:
        """Memory of LoRA weights, gradients and AdamW's two moments."""
        return 4 * sum(weight.numel() * 4 for weights in self.parameters for weight in weights)

    def warm_up(self) -> dict[str, float]:
        """Take one step on the largest batch there can be, then forget it: memory is there before users come.

        Returns the longest quantum per label, in seconds.
        """
        rows = torch.zeros(self.micro_batch, self.seq_len, dtype=torch.int64)
        data = TokenFile(
            path=Path("warm-up"),
            ids=rows.to(torch.int32).numpy(),
            labels=rows.to(torch.int32).numpy(),
            lengths=torch.full((self.micro_batch,), self.seq_len, dtype=torch.int32).numpy(),
        )
        plan = TrainPlan(rank=1, steps=1, seconds=math.inf, batch_size=self.micro_batch)
        longest: dict[str, float] = {}
        generator, began = self.train(plan, None, data, Progress()), time.perf_counter()
        for label in generator:
            now = time.perf_counter()
            longest[label] = max(longest.get(label, 0.0), now - began)
            began = time.perf_counter()
        for _ in self.load(None):
            pass
        return longest

    def train(
        self,
        plan: TrainPlan,
        parent: ReadFactors | None,
        data: TokenFile,
        progress: Progress,
        clock: Callable[[], float] = time.monotonic,
    ) -> Quanta:
        """Continue from `parent` (None: from zero) for `plan.steps` optimizer steps or `plan.seconds`."""
        deadline = clock() + plan.seconds
        yield from self.load(parent)
        order = _epochs(len(data), plan.seed)
        for step in range(plan.steps):
            if clock() >= deadline:
                return
            rows = [next(order) for _ in range(plan.batch_size)]
            yield from self._step(plan, step, data, rows, progress)

    def load(self, source: ReadFactors | None) -> Quanta:
        """Fill the buffers with an adapter and forget gradients and AdamW's moments, a layer per quantum."""
        for layer, weights, optimizer in zip(self.lora, self.parameters, self.optimizers, strict=True):
            with torch.inference_mode(False), torch.no_grad():
                for module, (a_ri, b_or) in layer.items():
                    a_ri.zero_()
                    b_or.zero_()
                    if source is not None:
                        new_a, new_b = source(module)
                        a_ri[: new_a.shape[0]] = new_a
                        b_or[:, : new_b.shape[1]] = new_b
                for weight in weights:
                    weight.grad = None
                for state in optimizer.state.values():
                    for moment in state.values():
                        moment.zero_()
            yield "load"

    def copy_out(self, rank: int, into: Factors, dtype: torch.dtype) -> Quanta:
        """Copy the adapter's first `rank` rows into `into`, on the CPU, a layer per quantum."""
        for layer in self.lora:
            with torch.inference_mode(False), torch.no_grad():
                for module, (a_ri, b_or) in layer.items():
                    into[module] = (
                        a_ri[:rank].to("cpu", dtype, copy=True),
                        b_or[:, :rank].to("cpu", dtype, copy=True).contiguous(),
                    )
            yield "copy_out"

    def evaluate(self, source: ReadFactors | None, data: TokenFile, results: list[Evaluation]) -> Quanta:
        """Append to `results` how an adapter (None: the base) does on held-out examples, teacher-forced."""
        yield from self.load(source)
        totals = Evaluation(loss_sum=0.0, loss_tokens=0, exact=0, examples=0)
        for first in range(0, len(data), self.micro_batch):
            rows = list(range(first, min(first + self.micro_batch, len(data))))
            ids_bt, labels_bt = self._batch(data, rows)
            answers = _Answers(labels_bt)
            with torch.inference_mode(False), torch.no_grad():
                hidden_bth, rotary = self._embed(ids_bt)
            for layer in self.layers:
                with torch.inference_mode(False), torch.no_grad():
                    hidden_bth = _run(layer, hidden_bth, rotary)
                yield "evaluate"
            loss, wrong = 0.0, set[int]()
            for chunk in answers.chunks(self.head_tokens):
                with torch.inference_mode(False), torch.no_grad():
                    logits_nv = self._logits(hidden_bth[chunk.rows, chunk.positions])
                    loss += F.cross_entropy(logits_nv, chunk.targets, reduction="sum").item()
                    wrong.update(chunk.rows[logits_nv.argmax(-1) != chunk.targets].tolist())
                yield "evaluate"
            totals = Evaluation(
                loss_sum=totals.loss_sum + loss,
                loss_tokens=totals.loss_tokens + answers.count,
                exact=totals.exact + len(rows) - len(wrong),
                examples=totals.examples + len(rows),
            )
        results.append(totals)

    def _step(self, plan: TrainPlan, step: int, data: TokenFile, rows: list[int], progress: Progress) -> Quanta:
        """One optimizer step: gradients accumulated over micro-batches, clipped by their global norm, AdamW."""
        micro_batches = [rows[at : at + self.micro_batch] for at in range(0, len(rows), self.micro_batch)]
        batches = [self._batch(data, micro) for micro in micro_batches]
        tokens = sum(int((labels[:, 1:] != NO_LOSS).sum()) for _, labels in batches)
        losses: list[torch.Tensor] = []
        for ids_bt, labels_bt in batches:
            yield from self._accumulate(ids_bt, labels_bt, tokens, losses)
        scale = _clip_scale(self.parameters, plan.clip_norm)
        rate = _learning_rate(plan, step)
        for weights, optimizer in zip(self.parameters, self.optimizers, strict=True):
            with torch.inference_mode(False), torch.no_grad():
                for weight in weights:
                    if weight.grad is not None:
                        weight.grad.mul_(scale)
                optimizer.param_groups[0].update(lr=rate, weight_decay=plan.weight_decay)
                optimizer.step()
                for weight in weights:
                    if weight.grad is not None:
                        weight.grad.zero_()  # kept: no allocation while serving
            yield "optimizer"
        loss = float(torch.stack(losses).sum()) if losses else 0.0
        if not math.isfinite(loss):
            raise TrainingError(f"the loss is {loss} at step {step}; lower the learning rate")
        progress.steps += 1
        progress.examples += len(rows)
        progress.loss_tokens += tokens
        progress.loss_sum += loss

    def _accumulate(
        self, ids_bt: torch.Tensor, labels_bt: torch.Tensor, tokens: int, losses: list[torch.Tensor]
    ) -> Quanta:
        """Forward and backward of one micro-batch; its loss is a sum over answer tokens, divided by `tokens`."""
        with torch.inference_mode(False), torch.no_grad():
            hidden_bth, rotary = self._embed(ids_bt)
        tape: list[tuple[torch.Tensor, torch.Tensor]] = []
        for index, layer in enumerate(self.layers):
            with differentiable():
                # Nothing below the first layer is trained, so its input needs no gradient.
                inner = hidden_bth.detach().requires_grad_(index > 0)
                hidden_bth = _run(layer, inner, rotary)
                tape.append((inner, hidden_bth))
            yield "forward"
        with torch.inference_mode(False):
            gradient_bth = torch.zeros_like(hidden_bth, requires_grad=False)
        for chunk in _Answers(labels_bt).chunks(self.head_tokens):
            with differentiable():
                inner_nh = hidden_bth.detach()[chunk.rows, chunk.positions].requires_grad_()
                loss = F.cross_entropy(self._logits(inner_nh), chunk.targets, reduction="sum")
                (loss / tokens).backward()  # type: ignore[no-untyped-call]
                assert inner_nh.grad is not None
                gradient_bth[chunk.rows, chunk.positions] = inner_nh.grad
                losses.append(loss.detach())
            yield "head"
        while tape:
            inner, outer = tape.pop()
            with differentiable():
                torch.autograd.backward(outer, gradient_bth)
                gradient_bth = inner.grad if inner.grad is not None else gradient_bth
            yield "backward"

    @torch.inference_mode(mode=False)  # what it makes is used in backward passes
    def _batch(self, data: TokenFile, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and labels [B, T] of some rows, cut to the longest; causal attention never looks at the padding."""
        device = self.model.model.embed_tokens.weight.device
        longest = int(data.lengths[rows].max())
        ids, labels = data.ids[rows, :longest], data.labels[rows, :longest]
        return torch.as_tensor(ids).long().to(device), torch.as_tensor(labels).long().to(device)

    def _embed(self, ids_bt: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        hidden_bth = self.model.model.embed_tokens(ids_bt)
        positions_bt = torch.arange(ids_bt.shape[1], device=ids_bt.device).unsqueeze(0)
        return hidden_bth, self.model.model.rotary_emb(hidden_bth, positions_bt)

    def _logits(self, hidden_nh: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model.lm_head(self.model.model.norm(hidden_nh))
        return logits.float()


@dataclass(frozen=True)
class _Chunk:
    """N answer tokens: predicted at (rows, positions), each [N]; `targets` [N] are their ids."""

    rows: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor


class _Answers:
    """The tokens of a micro-batch that carry a loss: position t predicts token t + 1."""

    @torch.inference_mode(mode=False)
    def __init__(self, labels_bt: torch.Tensor) -> None:
        self.rows, self.positions = (labels_bt[:, 1:] != NO_LOSS).nonzero(as_tuple=True)
        self.targets = labels_bt[self.rows, self.positions + 1]
        self.count = len(self.rows)

    def chunks(self, size: int) -> Iterator[_Chunk]:
        for first in range(0, self.count, size):
            part = slice(first, first + size)
            yield _Chunk(self.rows[part], self.positions[part], self.targets[part])


def _lora_of(layer: torch.nn.Module, prefix: str) -> Factors:
    return {
        f"{prefix}.{name}": (
            layer.get_parameter(f"{name}.lora_A.default.weight"),
            layer.get_parameter(f"{name}.lora_B.default.weight"),
        )
        for name, module in layer.named_modules()
        if isinstance(module, LoraLayer)
    }


def _run(layer: torch.nn.Module, hidden_bth: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """One decoder layer. Without a mask, sdpa attends causally."""
    result = layer(hidden_bth, attention_mask=None, position_embeddings=rotary)
    outer: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return outer


def _clip_scale(parameters: list[list[torch.Tensor]], clip_norm: float) -> torch.Tensor:
    """The factor that `torch.nn.utils.clip_grad_norm_` would apply."""
    gradients = [weight.grad for weights in parameters for weight in weights if weight.grad is not None]
    with torch.inference_mode(False), torch.no_grad():
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]))
        return torch.clamp(clip_norm / (norm + 1e-6), max=1.0)


def _learning_rate(plan: TrainPlan, step: int) -> float:
    if step < plan.warmup_steps:
        return plan.learning_rate * (step + 1) / plan.warmup_steps
    if plan.schedule == "constant":
        return plan.learning_rate
    progress = (step - plan.warmup_steps) / max(1, plan.steps - plan.warmup_steps)
    return plan.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def _epochs(rows: int, seed: int) -> Iterator[int]:
    """Row numbers, each epoch in a new order of its own generator."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(rows, generator=generator).tolist()
