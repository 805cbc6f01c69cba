"""`Job`: one training or evaluation in the engine, run a quantum at a time, with its results so far."""

import logging
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from serving.cotrainer.checkpoints.course import Course
from serving.cotrainer.checkpoints.writer import CheckpointWriter
from serving.cotrainer.lora import Factors, ParkedLayer, ReadFactors
from serving.cotrainer.memory import OUT_OF_MEMORY, out_of_memory
from serving.cotrainer.progress import Progress
from serving.cotrainer.quantum import BOUNDARIES, Quanta, Quantum
from serving.cotrainer.trainer import LoraTrainer
from serving.scores import Scores
from serving.trainer_socket import EvaluateJob, TrainJob
from umbel import peft_dir
from umbel.errors import TrainingError
from umbel.messages import JobState
from umbel.token_file import TokenFile

logger = logging.getLogger(__name__)


class Job:
    """A generator of quanta for an order of the daemon's, and its results."""

    def __init__(self, order: TrainJob | EvaluateJob, trainer: LoraTrainer, writer: CheckpointWriter) -> None:
        self.id = order.id
        self.order = order
        self.state, self.error = JobState.RUNNING, ""
        self.progress = Progress()
        self.evaluations: list[Scores] = []
        self.trained: Factors = {}
        self._writer = writer
        self._course: Course | None = None
        """That of a training job, once its files are open."""
        self._began, self._ended = time.monotonic(), 0.0
        self.quanta: Quanta | None = (
            self._evaluate(order, trainer) if isinstance(order, EvaluateJob) else self._train(order, trainer)
        )
        """None once no quantum will run any more."""
        self.next: Quantum | None = Quantum("open")
        """The quantum that `advance` will run; None at the end."""
        self.parked: deque[ParkedLayer] = deque()
        """Its part of the trainer's buffers, the first layer first, while another job has them."""

    @property
    def share(self) -> float | None:
        """Return the part of the training that it gets, in proportion to others'; None for an evaluation."""
        return self.order.share if isinstance(self.order, TrainJob) else None

    @property
    def open(self) -> bool:
        """Return whether quanta of it may still run."""
        return self.quanta is not None

    @property
    def interruptible(self) -> bool:
        """Return whether another job may have the buffers now."""
        return self.next is not None and self.next.kind in BOUNDARIES

    @property
    def seconds(self) -> float:
        """Return the time since the job began; once it has ended, the time that it took.

        The time until the checkpoint from which it went on counts, too.
        """
        return self.progress.before_s + (self._ended or time.monotonic()) - self._began

    def figures(self) -> dict[str, Any]:
        """Return the job's part of a CoTrainerStatus."""
        return {
            "job": self.id,
            "state": self.state,
            "error": self.error,
            "steps": self.progress.steps,
            "examples": self.progress.examples,
            "loss_tokens": self.progress.loss_tokens,
            "loss_sum": self.progress.loss_sum,
            "seconds": self.seconds,
            "share": min(1.0, self.progress.busy_s / self.seconds) if self.seconds else 0.0,
            "evaluation": self.evaluations[0].sums if self.evaluations else None,
        }

    def advance(self) -> None:
        """Run the announced quantum. Raises UmbelError if the job cannot go on, for want of memory, too."""
        assert self.quanta is not None
        try:
            self.next = next(self.quanta, None)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise TrainingError(f"{OUT_OF_MEMORY} ({error})") from None

    def finish(self, state: JobState, error: str = "") -> None:
        """Close the generator and set the final state; a job that has already ended keeps its own."""
        if self.quanta is not None:
            self.quanta.close()
            self.quanta, self._ended = None, time.monotonic()
            self.parked.clear()
            self.trained.clear()
            if self._course is not None:
                self._course.close()
        if not self.state.final:
            self.error, self.state = error, state

    def end(self) -> None:
        """Have the results of a finished generator written by a thread, which sets the final state."""
        if self.order.output is None:
            return self.finish(JobState.DONE)
        self.quanta, self._ended = None, time.monotonic()
        return threading.Thread(target=self._write, args=(Path(self.order.output),), daemon=True).start()

    def _train(self, order: TrainJob, trainer: LoraTrainer) -> Quanta:
        # Files are opened by the first quantum, "open": a missing one fails the job, not the message that started it.
        parent, data = read_factors(Path(order.parent)), TokenFile.open(Path(order.data))
        self._course = Course.of(order, data, self._writer)
        yield from trainer.train(order.plan, parent, data, self.progress, lambda: self.seconds, self._course)
        yield from trainer.copy_out(order.plan.rank, self.trained)

    def _evaluate(self, order: EvaluateJob, trainer: LoraTrainer) -> Quanta:
        source = read_factors(Path(order.adapter)) if order.adapter else None
        yield from trainer.evaluate(source, TokenFile.open(Path(order.data)), self.evaluations)

    def _write(self, path: Path) -> None:
        if self._course is not None:
            self._course.close()  # whoever gave the job may remove its checkpoint once it is done
        try:
            if self.evaluations:
                self.evaluations[0].write(path)
            else:
                self._write_adapter(path)
                if self._course is not None:
                    self._course.write_last()
        except Exception as error:  # nobody catches what a thread raises
            logger.exception("what job %s brought could not be written to %s", self.id, path)
            self.finish(JobState.FAILED, f"{path}: {error}")
        self.finish(JobState.DONE)
        self.trained.clear()

    def _write_adapter(self, path: Path) -> None:
        tensors: dict[str, torch.Tensor] = {}
        for module, (a_ri, b_or) in self.trained.items():
            tensors[peft_dir.key(module, "A")], tensors[peft_dir.key(module, "B")] = a_ri, b_or
        ordered = {name: tensors[name] for name in sorted(tensors)}
        peft_dir.replace_durably(path, safetensors.torch.save(ordered, {"format": "pt"}))


def read_factors(weights: Path) -> ReadFactors:
    """Open a weights file and return a function that reads one module, so that loading is many small quanta."""
    file: Any = safetensors.safe_open(weights, framework="pt")

    def read(module: str) -> tuple[torch.Tensor, torch.Tensor]:
        return file.get_tensor(peft_dir.key(module, "A")), file.get_tensor(peft_dir.key(module, "B"))

    return read
