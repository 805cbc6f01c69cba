"""`LoraTrainer`: LoRA training and evaluation as generators of quanta, the pieces of work that cannot be interrupted.

The caller of `next` decides when the next quantum runs: the co-trainer, between two iterations of a busy engine, or a
plain `for` loop. Gradients are those of an ordinary backward pass (see `serving.cotrainer.pieces`, also for the
notation of shapes). At every yield grad mode is as it was, and no random number is ever drawn from torch's global
generator. No quantum waits for a device: what one has computed is read by the host in the next one.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from transformers import PreTrainedModel

from serving.cotrainer.base_view import frozen_tensors
from serving.cotrainer.checkpoints.course import Course
from serving.cotrainer.lanes.readback import Readback
from serving.cotrainer.lora import Factor, Factors, KeptLinear, LayerFactors, ReadFactors, clip_scale, learning_rate
from serving.cotrainer.memory import Room, rehearse_shortage
from serving.cotrainer.microbatch import MicroBatch, groups, made_up, row_lengths
from serving.cotrainer.objectives.objective import Objective, even_weights, examples_in, loss_tokens
from serving.cotrainer.objectives.preference import Preference
from serving.cotrainer.pieces import SubBlock, Whole, evaluate_head, head, sub_blocks
from serving.cotrainer.progress import Applied, Progress
from serving.cotrainer.quantum import Pieces, Quanta, Quantum
from serving.scores import Scores
from umbel.errors import TrainingError
from umbel.messages import TrainPlan
from umbel.site import memory
from umbel.token_file import TokenFile


class LoraTrainer:
    """Trains one adapter at a time over a frozen causal LM.

    Outside an engine a `for` loop runs the quanta; `plan` is a TrainPlan, `data` a TokenFile, and `parent` returns the
    factors of the adapter to continue from (see `jobs.job.read_factors`):

        trainer = LoraTrainer(
            model, max_rank=8, target_modules=("q_proj", "v_proj"), seq_len=128, pieces=Pieces.whole(4, 128)
        )
        progress = Progress()
        for quantum in trainer.train(plan, parent, data, progress):
            print(quantum.kind, quantum.tokens)  # announced; it runs when the loop asks for the next one
        trained: Factors = {}
        for quantum in trainer.copy_out(plan.rank, trained):
            pass

    The buffers hold `max_rank`. Of a lower rank their first rows are used; the rest is zero and stays zero, because a
    pair of zero row and zero column gets no gradient. `pieces` may be assigned at any time: an optimizer step reads
    `micro_batch` when it begins, each of its micro-batches the other sizes. Jobs of `adapters` adapters may take turns.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_rank: int,
        target_modules: tuple[str, ...],
        seq_len: int,
        pieces: Pieces,
        adapters: int = 1,
    ) -> None:
        """Put LoRA layers into `model` and freeze the rest. Raises TrainingError if `seq_len` exceeds its window."""
        self.model, self.seq_len = model, seq_len
        self._room = Room(pieces)
        self.device: torch.device = model.model.embed_tokens.weight.device
        width, on_cpu = model.dtype.itemsize, self.device.type == "cpu"
        self._sizes = memory.Training(max_rank, target_modules, width, pieces.micro_batch, seq_len, adapters, on_cpu)
        self.parked_bytes = memory.parked_bytes(model.config.to_dict(), self._sizes)
        """Bytes of the jobs that wait while another one trains."""
        window = (
            getattr(model.config, "sliding_window", None) if getattr(model.config, "use_sliding_window", True) else None
        )
        if window and seq_len > window:
            raise TrainingError(f"[training].seq_len = {seq_len} is longer than the base's sliding window of {window}")
        self.frozen = frozen_tensors(model)
        KeptLinear.put_into(model, target_modules, max_rank)
        self.layers: list[torch.nn.Module] = list(model.model.layers)
        self.factors = [LayerFactors(layer, f"model.layers.{number}") for number, layer in enumerate(self.layers)]
        self.lengths: tuple[int, ...] = row_lengths(seq_len) if self.device.type == "cuda" else ()
        """Lengths that rows are padded to; empty: a micro-batch is as long as its longest row."""

    @property
    def pieces(self) -> Pieces:
        """Return the sizes that were assigned, or what memory has sufficed for."""
        return self._room.pieces

    @pieces.setter
    def pieces(self, pieces: Pieces) -> None:
        self._room.assigned = pieces

    @property
    def state_bytes(self) -> int:
        """Return the bytes of LoRA weights, gradients and AdamW's two moments."""
        return 4 * sum(factors.elements * 4 for factors in self.factors)

    def expected_bytes(self, rows: int) -> int:
        """Return the peak that training takes with so many rows, kept or recomputed as now, by arithmetic."""
        return memory.training_bytes(self.model.config.to_dict(), self._sizes, rows, self.pieces.recompute)

    def warm_up(self) -> Quanta:
        """Take a step of each size that can occur, then set all to zero, so that memory is there before users come.

        Where rows may have any length, the largest size stands for all.
        """
        size = self.pieces.micro_batch
        for rows in memory.ladder(size)[::-1] if self.lengths else [size]:
            for tokens in self.lengths[::-1] or [self.seq_len]:
                yield from self.rehearse(rows, tokens)
        yield from self.load(None, remember=True)
        yield from self.load(None)

    def rehearse(self, rows: int, tokens: int) -> Quanta:
        """Take one optimizer step on `rows` × `tokens` made-up tokens, all with a loss. It changes the factors."""
        plan = TrainPlan(rank=1, steps=1, seconds=1.0, batch_size=rows)
        yield Quantum("step")
        even = even_weights(rows, rows * tokens, self.device)
        loss = yield from self._accumulate(made_up(rows, tokens), list(range(rows)), even)
        yield from self._apply(plan, 0, 0.0, loss)

    def train(
        self,
        plan: TrainPlan,
        parent: ReadFactors | None,
        data: TokenFile,
        progress: Progress,
        elapsed: Callable[[], float] | None = None,
        course: Course | None = None,
    ) -> Quanta:
        """Continue from `parent` (None: zeros, through which no gradient flows) for `plan.steps` or `plan.seconds`.

        Examples are drawn without replacement, epoch after epoch, in the order that `plan.seed` gives; `course` may
        know of others, of an earlier end, and of a checkpoint to go on from. Before each `step` another job may have
        the buffers. `elapsed` returns the seconds so far; None: those since the first quantum. Raises TrainingError if
        the loss of a step is not finite, or `data` has no pairs for an objective of pairs.
        """
        elapsed = elapsed or progress.stopwatch()
        objective = (Preference if plan.objective == "dpo" else Objective)(plan, data)
        course = course or Course(plan, examples_in(plan, data))
        for factors in self.factors:
            factors.train_only(plan.factors)
        score, ahead, begun = partial(self._scores, data), partial(course.ahead, self.factors), False
        while not begun:  # again, if the checkpoint turns out to be damaged
            yield from self.load(parent, remember=plan.proximal > 0)
            yield from objective.prepare(ahead, score, lambda: elapsed() / plan.seconds)
            begun = yield from course.resume(self.factors, progress)
        applied: list[Applied] = []
        for step in range(progress.steps, course.steps):
            yield Quantum("step")
            while applied:  # the step before
                applied.pop().book(progress)
            yield from course.save_if_due(self.factors, progress, elapsed())
            spent = elapsed() / plan.seconds
            if spent >= 1:
                break
            rows = objective.rows(course.draw(plan.batch_size, objective.knows))
            yield from self._step(plan, step, spent, data, rows, objective, applied)
        yield Quantum("read_back")
        for last in applied:
            last.book(progress)
        yield from course.save_last(self.factors, progress, elapsed())

    def load(self, source: ReadFactors | None, *, remember: bool = False) -> Quanta:
        """Fill the buffers with an adapter (None: zeros), gradients and moments with zero, a layer per quantum.

        `remember` keeps the adapter as the parent of FedProx's term.
        """
        for factors in self.factors:
            yield Quantum("load")
            factors.load(source, remember=remember)

    def copy_out(self, rank: int, into: Factors) -> Quanta:
        """Copy the first `rank` rows of A and columns of B into `into`, fp32 on the CPU, a layer per quantum."""
        copies: list[tuple[LayerFactors, dict[Factor, Readback]]] = []
        for factors in self.factors:
            yield Quantum("copy_out")
            for started, copy in copies:
                started.end_copy(copy, rank, into)
            copies = [(factors, factors.start_copy())]
        yield Quantum("read_back")
        for started, copy in copies:
            started.end_copy(copy, rank, into)

    def evaluate(self, source: ReadFactors | None, data: TokenFile, results: list[Scores]) -> Quanta:
        """Append to `results` the scores of an adapter (None: the base) on each example of `data`, teacher-forced."""
        yield from self.load(source)
        scores = Readback((yield from self._scores(data, range(len(data)))))
        yield Quantum("read_back")
        loss_e, wrong_e, tokens_e = scores.read().numpy().T
        results.append(Scores(loss_e, tokens_e.astype(np.int32), wrong_e == 0))

    def _scores(self, data: TokenFile, rows: Sequence[int]) -> Whole:
        """Return the scores [E, 3] of some rows, as in `evaluate_head`, with the adapter that is in the buffers."""
        with torch.inference_mode(False):
            scores_e3 = torch.zeros(len(rows), 3, dtype=torch.float64, device=self.device)
        at = 0
        while at < len(rows):
            size = self.pieces.micro_batch
            some = groups(list(rows[at : at + size]), size)[0]
            with torch.inference_mode(False):
                scores_b3 = scores_e3[at : at + len(some)]
            try:
                yield from self._evaluate_rows(data, some, scores_b3)
            except (RuntimeError, MemoryError) as error:
                self._room.shrink(error)
                scores_b3.zero_()
                continue
            at += len(some)
        return scores_e3

    def _evaluate_rows(self, data: TokenFile, rows: list[int], scores_b3: torch.Tensor) -> Quanta:
        """Add the scores of some rows to `scores_b3`, in place."""
        pieces = self.pieces
        rehearse_shortage(len(rows), self.device)
        batch = MicroBatch.of(data, rows, self.device, self.lengths)
        hidden, blocks = self._begin(batch, pieces)
        for block in blocks:
            hidden = yield from block.evaluate(batch.shaped(hidden, block.kind))
        hidden_nh = hidden.view(-1, hidden.shape[-1])
        yield from evaluate_head(self.model, hidden_nh, batch.answers, pieces.head_tokens, scores_b3)

    def _step(
        self, plan: TrainPlan, step: int, spent: float, data: TokenFile, rows: list[int], objective: Objective,
        applied: list[Applied],
    ) -> Quanta:  # fmt: skip
        """Take an optimizer step; where memory does not suffice, begin it again with smaller micro-batches.

        `spent`: the share of `plan.seconds` that is over.
        """
        weight_e, loss = yield from objective.weigh(rows, partial(self._scores, data), self.device)
        while True:
            try:
                summed = yield from self._accumulate(data, rows, weight_e)
                break
            except (RuntimeError, MemoryError) as error:
                self._room.shrink(error)
            for factors in self.factors:  # nothing of the step has been applied
                factors.forget_gradients()
        loss = summed if loss is None else loss
        yield from self._apply(plan, step, spent, loss)
        tokens = int(data.lengths[rows].sum())
        applied.append(Applied(step, plan.batch_size, tokens, loss_tokens(data, rows), Readback(loss)))

    def _accumulate(self, data: TokenFile, rows: list[int], weight_e: torch.Tensor) -> Whole:
        """Add up the gradients of the rows' losses times their weights, a micro-batch after the other.

        Return the sum of the losses of their answer tokens, 0-d.
        """
        size = self.pieces.micro_batch
        micro_batches = [MicroBatch.of(data, some, self.device, self.lengths) for some in groups(rows, size)]
        with torch.inference_mode(False):
            loss = torch.zeros((), device=self.device)
            weights = torch.split(weight_e, [len(batch.ids) for batch in micro_batches])
        for batch, weight_b in zip(micro_batches, weights, strict=True):
            if batch.answers.count:
                yield from self._differentiate(batch, weight_b, loss)
        return loss

    def _apply(self, plan: TrainPlan, step: int, spent: float, loss: torch.Tensor) -> Quanta:
        """Clip the gradients by their global norm and run AdamW, a layer per quantum. It takes no memory of its own."""
        rate, clip = learning_rate(plan, step, spent), loss
        for number, factors in enumerate(self.factors):
            yield Quantum("optimizer")
            with torch.inference_mode(False), torch.no_grad():
                if number == 0:
                    clip = clip_scale([each.norm(plan.proximal) for each in self.factors], plan.clip_norm)
                factors.step(clip, rate, plan.weight_decay)

    def _differentiate(self, batch: MicroBatch, weight_b: torch.Tensor, loss: torch.Tensor) -> Quanta:
        """Run forward and backward on one micro-batch; its loss is the sum of its rows' losses times their weights.

        The sum without weights is added to `loss`, 0-d, in place.
        """
        pieces = self.pieces
        rehearse_shortage(len(batch.ids), self.device)
        hidden, blocks = self._begin(batch, pieces)
        for block in blocks:
            hidden = yield from block.forward(batch.shaped(hidden, block.kind))
        hidden_nh = hidden.view(-1, hidden.shape[-1])
        gradient = yield from head(self.model, hidden_nh, batch.answers, pieces.head_tokens, weight_b, loss)
        while blocks:
            block = blocks.pop()
            if block.differentiated:
                gradient = yield from block.backward(batch.shaped(gradient, block.kind))

    def _begin(self, batch: MicroBatch, pieces: Pieces) -> tuple[torch.Tensor, list[SubBlock]]:
        """Return the embedded tokens [B, T, H], and the sub-blocks that they go through."""
        tokens = batch.ids.shape[1]
        with torch.inference_mode(False), torch.no_grad():
            hidden_bth = self.model.model.embed_tokens(batch.ids)
            positions = torch.arange(tokens, device=self.device).unsqueeze(0)
            rotary = self.model.model.rotary_emb(hidden_bth, positions)
        return hidden_bth, sub_blocks(self.layers, [factors.adapts for factors in self.factors], rotary, tokens, pieces)
