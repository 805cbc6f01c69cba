"""`LoraTrainer`: LoRA training and evaluation as generators of quanta, the pieces of work that cannot be interrupted.

The caller of `next` decides when the next quantum runs: the co-trainer, between two iterations of a busy engine, or a
plain `for` loop. Gradients are those of an ordinary backward pass (see `serving.cotrainer.pieces`, also for the
notation of shapes). At every yield grad mode is as it was, and no random number is ever drawn from torch's global
generator. On a CUDA device no quantum waits for the device: the host reads the loss of a step during the next one.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import PreTrainedModel

from serving.cotrainer.lane import Readback
from serving.cotrainer.lora import Factors, LayerFactors, ReadFactors, clip_scale
from serving.cotrainer.microbatch import MicroBatch, epochs
from serving.cotrainer.pieces import Block, SubBlock, attention, evaluate_head, head, mlp
from serving.cotrainer.quantum import Pieces, Quanta, Quantum
from serving.scores import Scores
from umbel.errors import TrainingError
from umbel.messages import TrainPlan
from umbel.token_file import NO_LOSS, TokenFile


@dataclass
class Progress:
    """Work of a training job so far. The trainer adds to it after each step; others read it."""

    steps: int = 0
    examples: int = 0
    tokens: int = 0
    """Tokens in the rows of those steps, without padding."""
    loss_tokens: int = 0
    """Tokens in them that carry a loss."""
    loss_sum: float = 0.0
    """Sum of the losses of those, in nats."""


@dataclass(frozen=True)
class _Applied:
    """An optimizer step that was applied, its loss on its way to the host."""

    step: int
    examples: int
    tokens: int
    loss_tokens: int
    loss: Readback

    def book(self, progress: Progress) -> None:
        """Add the step to `progress`. Raises TrainingError for a loss that is not finite."""
        loss = float(self.loss.read())
        if not math.isfinite(loss):
            raise TrainingError(f"the loss is {loss} at step {self.step}; lower the learning rate")
        progress.steps += 1
        progress.examples += self.examples
        progress.tokens += self.tokens
        progress.loss_tokens += self.loss_tokens
        progress.loss_sum += loss


class LoraTrainer:
    """Trains one adapter at a time over a frozen causal LM.

    Outside an engine a `for` loop runs the quanta; `plan` is a TrainPlan, `data` a TokenFile, and `parent` returns the
    factors of the adapter to continue from (see `job.read_factors`):

        trainer = LoraTrainer(
            model, max_rank=8, target_modules=("q_proj", "v_proj"), seq_len=128, pieces=Pieces.whole(4, 128)
        )
        progress = Progress()
        for quantum in trainer.train(plan, parent, data, progress):
            print(quantum.kind, quantum.tokens)  # announced; it runs when the loop asks for the next one
        trained: Factors = {}
        for quantum in trainer.copy_out(plan.rank, trained):
            pass

    The buffers hold `max_rank`. An adapter of a lower rank lies in their first rows; the rest is zero and stays zero,
    because a pair of zero row and zero column gets no gradient. `pieces` may be assigned at any time: an optimizer step
    reads `micro_batch` when it begins, each of its micro-batches reads the other sizes.
    """

    def __init__(
        self, model: PreTrainedModel, *, max_rank: int, target_modules: tuple[str, ...], seq_len: int, pieces: Pieces
    ) -> None:
        """Put LoRA layers into `model` and freeze the rest. Raises TrainingError if `seq_len` exceeds its window."""
        self.model = model
        self.seq_len, self.pieces = seq_len, pieces
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
        self.factors = [LayerFactors(layer, f"model.layers.{number}") for number, layer in enumerate(self.layers)]
        self.device: torch.device = model.model.embed_tokens.weight.device

    @property
    def state_bytes(self) -> int:
        """Return the bytes of LoRA weights, gradients and AdamW's two moments."""
        return 4 * sum(factors.elements * 4 for factors in self.factors)

    def warm_up(self) -> None:
        """Take a step on the largest micro-batch, then set all to zero, so that memory is there before users come."""
        for _ in self.rehearse(self.pieces.micro_batch, self.seq_len):
            pass
        for _ in self.load(None):
            pass

    def rehearse(self, rows: int, tokens: int) -> Quanta:
        """Take one optimizer step on `rows` × `tokens` made-up tokens, all with a loss. It changes the factors."""
        ids = np.zeros((rows, tokens), np.int32)
        data = TokenFile(Path("rehearsal"), ids, ids, np.full(rows, tokens, np.int32))
        plan = TrainPlan(rank=1, steps=1, seconds=1.0, batch_size=rows)  # `_step` has no deadline
        yield from self._step(plan, 0, 0.0, data, list(range(rows)), [])

    def train(
        self,
        plan: TrainPlan,
        parent: ReadFactors | None,
        data: TokenFile,
        progress: Progress,
        clock: Callable[[], float] = time.monotonic,
    ) -> Quanta:
        """Continue from `parent` (None: zeros, through which no gradient flows) for `plan.steps` or `plan.seconds`.

        Rows are drawn without replacement, epoch after epoch, in the order that `plan.seed` gives. Raises TrainingError
        if the loss of a step is not finite.
        """
        began = clock()
        for factors in self.factors:
            factors.train_only(plan.factors)
        yield from self.load(parent, remember=plan.proximal > 0)
        order = epochs(len(data), plan.seed)
        applied: list[_Applied] = []
        for step in range(plan.steps):
            spent = (clock() - began) / plan.seconds
            if spent >= 1:
                break
            rows = [next(order) for _ in range(plan.batch_size)]
            yield from self._step(plan, step, spent, data, rows, applied)
            while len(applied) > (self.device.type == "cuda"):
                applied.pop(0).book(progress)
        for late in applied:
            late.book(progress)

    def load(self, source: ReadFactors | None, *, remember: bool = False) -> Quanta:
        """Fill the buffers with an adapter (None: zeros), gradients and moments with zero, a layer per quantum.

        `remember` keeps the adapter as the parent of FedProx's term.
        """
        for factors in self.factors:
            yield Quantum("load")
            factors.load(source, remember=remember)

    def copy_out(self, rank: int, into: Factors) -> Quanta:
        """Copy the first `rank` rows of A and columns of B into `into`, fp32 on the CPU, a layer per quantum."""
        copies = []
        for factors in self.factors:
            if self.device.type == "cuda":  # start all copies before the first is read
                yield Quantum("copy_out")
            copies.append(factors.start_copy())
        for factors, copy in zip(self.factors, copies, strict=True):
            yield Quantum("copy_out")
            factors.end_copy(copy, rank, into)

    def evaluate(self, source: ReadFactors | None, data: TokenFile, results: list[Scores]) -> Quanta:
        """Append to `results` the scores of an adapter (None: the base) on each example of `data`, teacher-forced."""
        yield from self.load(source)
        with torch.inference_mode(False):
            scores_e2 = torch.zeros(len(data), 2, dtype=torch.float64, device=self.device)
        tokens_e = np.zeros(len(data), np.int32)
        at = 0
        while at < len(data):
            pieces = self.pieces
            rows = list(range(at, min(at + pieces.micro_batch, len(data))))
            batch = MicroBatch.of(data, rows, self.device)
            hidden, blocks = self._begin(batch, pieces)
            for block in blocks:
                hidden = yield from block.evaluate(_shaped(hidden, batch, block))
            hidden_nh = hidden.view(-1, hidden.shape[-1])
            with torch.inference_mode(False):
                scores_b2 = scores_e2[at : at + len(rows)]
            yield from evaluate_head(self.model, hidden_nh, batch.answers, pieces.head_tokens, scores_b2)
            tokens_e[rows] = np.count_nonzero(data.labels[rows, 1:] != NO_LOSS, axis=1)
            at += len(rows)
        loss_e, wrong_e = Readback(scores_e2).read().numpy().T
        results.append(Scores(loss_e, tokens_e, wrong_e == 0))

    def _step(
        self, plan: TrainPlan, step: int, spent: float, data: TokenFile, rows: list[int], applied: list[_Applied]
    ) -> Quanta:
        """Take an optimizer step: add up gradients of micro-batches, clip them by their global norm, run AdamW.

        `spent`: the share of `plan.seconds` that is over.
        """
        size = self.pieces.micro_batch
        micro_batches = [MicroBatch.of(data, rows[at : at + size], self.device) for at in range(0, len(rows), size)]
        loss_tokens = sum(batch.answers.count for batch in micro_batches)
        with torch.inference_mode(False):
            loss = torch.zeros((), device=self.device)
            scale = torch.full((), 1 / max(1, loss_tokens), device=self.device)
        for batch in micro_batches:
            if batch.answers.count:
                yield from self._accumulate(batch, scale, loss)
        rate, clip = _learning_rate(plan, step, spent), loss
        for number, factors in enumerate(self.factors):
            yield Quantum("optimizer")
            with torch.inference_mode(False), torch.no_grad():
                if number == 0:
                    clip = clip_scale([each.norm(plan.proximal) for each in self.factors], plan.clip_norm)
                factors.step(clip, rate, plan.weight_decay)
        tokens = int(data.lengths[rows].sum())
        applied.append(_Applied(step, len(rows), tokens, loss_tokens, Readback(loss)))

    def _accumulate(self, batch: MicroBatch, scale: torch.Tensor, loss: torch.Tensor) -> Quanta:
        """Run forward and backward on one micro-batch; its loss is the sum over answer tokens times `scale`, 0-d.

        The unscaled sum is added to `loss`, 0-d, in place.
        """
        pieces = self.pieces
        hidden, blocks = self._begin(batch, pieces)
        for block in blocks:
            hidden = yield from block.forward(_shaped(hidden, batch, block))
        hidden_nh = hidden.view(-1, hidden.shape[-1])
        gradient = yield from head(self.model, hidden_nh, batch.answers, pieces.head_tokens, scale, loss)
        while blocks:
            block = blocks.pop()
            if block.differentiated:
                gradient = yield from block.backward(_shaped(gradient, batch, block))

    def _begin(self, batch: MicroBatch, pieces: Pieces) -> tuple[torch.Tensor, list[SubBlock]]:
        """Return the embedded tokens [B, T, H], and the sub-blocks that they go through."""
        tokens = batch.ids.shape[1]
        with torch.inference_mode(False), torch.no_grad():
            hidden_bth = self.model.model.embed_tokens(batch.ids)
            positions = torch.arange(tokens, device=self.device).unsqueeze(0)
            rotary = self.model.model.rotary_emb(hidden_bth, positions)
        blocks: list[SubBlock] = []
        trained_below = False
        for layer, factors in zip(self.layers, self.factors, strict=True):
            runs: dict[Block, partial[torch.Tensor]] = {
                "attention": partial(attention, layer, rotary),
                "mlp": partial(mlp, layer),
            }
            for kind, run in runs.items():
                size, width = (pieces.mlp_tokens, 1) if kind == "mlp" else (pieces.attention_rows, tokens)
                trained = trained_below or factors.adapts(kind)
                blocks.append(SubBlock(kind, run, size, width, trained_below, trained, pieces.recompute))
                trained_below = trained
        return hidden_bth, blocks


def _shaped(hidden: torch.Tensor, batch: MicroBatch, block: SubBlock) -> torch.Tensor:
    """View hidden states as `block` takes them: [B, T, H] for attention, [N, H] for the MLP."""
    return hidden.view(-1, hidden.shape[-1]) if block.kind == "mlp" else hidden.view(*batch.ids.shape, -1)


def _learning_rate(plan: TrainPlan, step: int, spent: float) -> float:
    """Return the rate of a step: linear warm-up, then constant or half a cosine.

    The cosine ends with the steps or with the seconds, of which a share is `spent`, whichever are used up first: a site
    that its users keep busy ends as low as the others.
    """
    if step < plan.warmup_steps:
        return plan.learning_rate * (step + 1) / plan.warmup_steps
    if plan.schedule == "constant":
        return plan.learning_rate
    progress = max((step - plan.warmup_steps) / max(1, plan.steps - plan.warmup_steps), spent)
    return plan.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
