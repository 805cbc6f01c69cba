"""`Paying`: rounds of a site on a real tiny model, measured for what they bring; updates become the next version."""

import asyncio
import json
import random
from pathlib import Path
from typing import Any

from client.data.prepare import Preparation, Prepared, prepare
from client.rounds.measured import Measured
from client.rounds.measured_round import Note, Trained
from serving.trainer_socket import CoTrainerStatus, EvaluateJob, TrainJob
from tests.toys.scheduler import RANK, ToyScheduler
from umbel import peft_dir
from umbel.base.shapes import LINEARS, linear_shapes
from umbel.messages import JobState, RoundOrder, TrainPlan

SEQ_LEN = 48
MODEST: dict[str, Any] = {"micro_batch": 8, "seq_len": SEQ_LEN}
"""Settings of a trainer for this data."""


class Paying:
    """Rounds one after the other; time passes when a test says so."""

    def __init__(self, folder: Path, scheduler: ToyScheduler) -> None:
        self.folder, self.scheduler = folder, scheduler
        self.now = 1e9
        self.adopts = True
        """True where each update becomes the version that the next round begins with."""
        self.jobs: list[TrainJob | EvaluateJob] = []
        self.tokens = 0
        """Tokens with a loss that were trained on, those of bursts that were thrown away included."""
        self.number = 0
        self.file = folder / "data.jsonl"
        self.file.write_text("")
        self.head = folder / "head.safetensors"
        scheduler.grants.per_iteration = 100_000
        self.head.write_bytes(untrained(scheduler.model))
        self.measured = self.anew()

    def anew(self, **changes: Any) -> Measured:
        """Return what trains the rounds, as a daemon that was started again has it."""
        given: dict[str, Any] = {"everything": False, "clock": lambda: self.now, **changes}
        self.measured = Measured(self, "support", self.folder / "worth", **given)  # type: ignore[arg-type]
        return self.measured

    def write(self, ask: str, answers: tuple[str, ...], count: int = 320, first: int = 0, **fields: Any) -> None:
        """Append examples, whose answers are drawn by lot: how to answer is soon learnt, and then nothing more is."""
        lot = random.Random(ask)
        with self.file.open("a") as file:
            for number in range(first, first + count):
                example = {"prompt": f"{ask} {number}", "completion": lot.choice(answers), **fields}
                file.write(json.dumps(example) + "\n")

    def data(self) -> Prepared:
        evaluated = self.folder / "eval.jsonl"
        evaluated.write_text(json.dumps({"prompt": "hello", "completion": "world"}))
        return prepare(Preparation(self.file, evaluated, 0.1, self.scheduler.model, SEQ_LEN, self.folder / "tokens"))

    async def follow(self, job: TrainJob | EvaluateJob, note: Note) -> CoTrainerStatus:
        """Do what `client.rounds.following.Following.follow` does."""
        self.jobs.append(job)
        self.scheduler.tell(job)
        status = self.scheduler.finish()
        note(status)
        return status

    def round(self, steps: int = 40, **plan: Any) -> Trained:
        """Train a round from the head; what it sends is the head then, if it is adopted."""
        self.number += 1
        key = f"0123456789abcdef-{self.number}-parent"
        parent = peft_dir.digest(self.head.read_bytes())
        fields = {"rank": RANK, "steps": steps, "seconds": 1e6, "learning_rate": 4e-3, "seed": self.number, **plan}
        order = RoundOrder(key=key, base="b", parent=parent, round=self.number, plan=TrainPlan(**fields))
        folder = self.folder / key
        folder.mkdir(exist_ok=True)
        data, output = self.data(), folder / "update.safetensors"
        job = TrainJob(
            id=f"support/{key}", plan=order.plan, parent=str(self.head), data=str(data.train), output=str(output)
        )
        before = len(self.jobs)
        trained = asyncio.run(self.measured.train(order, job, data, lambda status: None))
        self.tokens += max(
            (status.progress.loss_tokens for job in self.jobs[before:] if (status := self._job(job.id))), default=0
        )
        self.measured.remember(trained)
        if trained.state is JobState.DONE and self.adopts:
            self.head.write_bytes(output.read_bytes())
        return trained

    def _job(self, name: str) -> Any:
        return self.scheduler.cotrainer.jobs.find(name)


def untrained(model: Path) -> bytes:
    """Return an adapter that changes nothing yet."""
    import numpy as np

    tensors: peft_dir.Tensors = {}
    generator = np.random.default_rng(0)
    for module, shape in linear_shapes(model, LINEARS).items():
        tensors |= peft_dir.untrained(module, shape, RANK, np.dtype(np.float32), generator)
    return peft_dir.encode(tensors)
