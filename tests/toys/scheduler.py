"""`ToyScheduler`: SGLang's scheduler as far as umbel's hooks see it, over a real tiny model."""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import torch
import zmq
from pydantic import BaseModel

from serving.cotrainer.cotrainer import CoTrainer
from serving.cotrainer.governor import Finished, Load
from serving.cotrainer.hooks import Hooks
from serving.cotrainer.lanes.lane import CpuLane
from serving.cotrainer.predictor import Batch
from serving.cotrainer.quantum import Quanta
from serving.cotrainer.trainer import LoraTrainer
from serving.trainer_socket import (
    DAEMON_KEYS,
    CoTrainerSettings,
    CoTrainerStatus,
    EvaluateJob,
    StatusQuery,
    TrainJob,
    socket_path,
)
from tests.toys.serving.served_model import fused
from umbel import peft_dir, token_file, wire
from umbel.base.shapes import LINEARS, linear_shapes
from umbel.messages import TrainPlan
from umbel.site.sections import SloSection, TrainingSection

RANK, MAX_RANK, SEQ_LEN, MICRO_BATCH = 4, 8, 16, 2
PATIENCE_MS = 20_000
T = TypeVar("T")


def trainer_settings(**changes: Any) -> CoTrainerSettings:
    """Return the settings of a small trainer; all others are a site file's defaults."""
    fields: dict[str, Any] = {
        **TrainingSection(data=Path("none")).model_dump(exclude=DAEMON_KEYS), **SloSection().model_dump(),
        "max_rank": MAX_RANK, "target_modules": LINEARS, "adapters": 1, "micro_batch": MICRO_BATCH, "seq_len": SEQ_LEN,
        **changes,
    }  # fmt: skip
    return CoTrainerSettings(**fields)


class ToyScheduler:
    """An engine whose load a test sets, with umbel's hooks on it.

    Training work is noted twice: `labels` are what the trainer's generators announced, `work` is what torch computed.
    """

    def __init__(self, run_dir: Path, model: Path, served: torch.nn.Module | None = None, **settings: Any) -> None:
        self.run_dir, self.model = run_dir, model
        trainer_settings(**settings).write(run_dir)
        self.context = zmq.Context()
        self.requests, self._users = self.context.socket(zmq.PULL), self.context.socket(zmq.PUSH)
        self._users.connect(f"tcp://127.0.0.1:{self.requests.bind_to_random_port('tcp://127.0.0.1')}")
        self._daemon = self.context.socket(zmq.DEALER)
        self._daemon.connect(f"ipc://{socket_path(run_dir)}")
        poller = zmq.Poller()
        poller.register(self.requests, zmq.POLLIN)
        self.scheduler = SimpleNamespace(
            idle_sleeper=SimpleNamespace(poller=poller), running_batch=None, last_batch=None, waiting_queue=[],
            chunked_req=None,
            tp_worker=SimpleNamespace(model_runner=SimpleNamespace(model=served or fused(model))),
            server_args=SimpleNamespace(model_path=str(model)),
        )  # fmt: skip
        self.sleeps = 0
        self.labels: list[str] = []
        self.work: list[str] = []
        self.on_quantum: Callable[[int], None] = lambda count: None
        """Called with the number of quanta so far, within the quantum."""
        self.grants = Grants()
        self.hooks = Hooks(run_dir)
        self.hooks.after_init(None, self.scheduler)
        if self.hooks.cotrainer is not None and self.hooks.cotrainer.trainer is not None:
            self._watch(self.hooks.cotrainer.trainer)
            self.cotrainer.governor, self.cotrainer.lane = self.grants, CpuLane(itertools.count(0.0).__next__)
            self.cotrainer.predictor.quantum_high = lambda quantum: 1.0  # type: ignore[method-assign]

    @property
    def cotrainer(self) -> CoTrainer:
        assert self.hooks.cotrainer is not None
        return self.hooks.cotrainer

    @property
    def trainer(self) -> LoraTrainer:
        assert self.cotrainer.trainer is not None
        return self.cotrainer.trainer

    def close(self) -> None:
        if self.hooks.cotrainer is not None:
            for job in self.hooks.cotrainer.jobs.known:
                while not job.open and not job.state.final:
                    time.sleep(0.01)  # its thread is writing into a folder that is removed next
            self.hooks.cotrainer.commands.socket.close(0)
        self.context.destroy(0)

    def load(self, running: int = 0, waiting: int = 0) -> None:
        streams = [request(f"stream-{number}", answered=3) for number in range(running)]
        self.scheduler.running_batch = SimpleNamespace(reqs=streams) if running else None
        self.scheduler.waiting_queue = [request(f"waiting-{number}") for number in range(waiting)]

    def busy(self) -> list[str]:
        """Run one iteration of the scheduler; return the labels of the quanta that ran in it."""
        before = len(self.labels)
        self.hooks.before_iteration(self.scheduler)
        return self.labels[before:]

    def open_files(self) -> None:
        """Run the first quantum of a job, which opens its files and trains nothing yet."""
        per_iteration, self.grants.per_iteration = self.grants.per_iteration, 1
        assert self.busy() == []
        self.grants.per_iteration = per_iteration

    def idle(self) -> list[str]:
        """Let the scheduler sleep once; return the labels of the quanta that ran instead."""
        before = len(self.labels)
        self.hooks.around_sleep(self._sleep, self.scheduler)
        return self.labels[before:]

    def arrive(self) -> None:
        """Put a user's request on the scheduler's socket."""
        self._users.send(b"request")
        assert self.requests.poll(PATIENCE_MS)

    def take(self) -> None:
        """Take the request off the scheduler's socket."""
        self.requests.recv()

    def tell(self, message: BaseModel | bytes, *, unpaced: bool = False) -> CoTrainerStatus:
        """Send a message of the daemon's; return the answer given in the next iteration, of an engine that is idle.

        `unpaced`: a thread of the co-trainer's may train meanwhile.
        """
        self._daemon.send(message if isinstance(message, bytes) else wire.pack_model(message))
        assert self.cotrainer.commands.socket.poll(PATIENCE_MS)
        running, waiting = self.scheduler.running_batch, self.scheduler.waiting_queue
        self.load()
        assert self.busy() == [] or unpaced, "an idle engine trains in the sleeper's place only"
        self.scheduler.running_batch, self.scheduler.waiting_queue = running, waiting
        assert self._daemon.poll(PATIENCE_MS)
        return wire.unpack_model(self._daemon.recv(), CoTrainerStatus)

    def finish(self) -> CoTrainerStatus:
        """Let an idle engine train to the end of the job."""
        self.load()
        while not (status := self.tell(StatusQuery())).state.final:
            self.idle()
        return status

    def train_job(self, job: str = "job", **changes: Any) -> TrainJob:
        """Return a small job over random text that continues from a random adapter."""
        data, parent = self.run_dir / "train.npy", self.run_dir / "parent.safetensors"
        write_data(data)
        parent.write_bytes(random_adapter(self.model))
        plan = TrainPlan(rank=RANK, steps=2, seconds=1e6, batch_size=2 * MICRO_BATCH)
        fields: dict[str, Any] = {"id": job, "plan": plan, "parent": str(parent), "data": str(data)}
        return TrainJob(**{**fields, "output": str(self.run_dir / f"{job}.safetensors"), **changes})

    def evaluate_job(self, job: str = "evaluate") -> EvaluateJob:
        order = self.train_job()
        return EvaluateJob(id=job, adapter=order.parent, data=order.data)

    def _sleep(self, scheduler: Any) -> None:
        assert scheduler is self.scheduler
        self.sleeps += 1

    def _watch(self, trainer: LoraTrainer) -> None:
        for name in ("train", "evaluate", "copy_out"):
            setattr(trainer, name, self._counted(getattr(trainer, name)))
        for layer in trainer.layers:
            layer.self_attn.register_forward_pre_hook(lambda *_: self.work.append("attention"))
            layer.mlp.register_forward_pre_hook(lambda *_: self.work.append("mlp"))
        trainer.model.lm_head.register_forward_pre_hook(lambda *_: self.work.append("head"))
        for factors in trainer.factors:
            factors.optimizer.register_step_pre_hook(lambda *_: self.work.append("step"))

    def _counted(self, generator: Callable[..., Quanta]) -> Callable[..., Quanta]:
        def counted(*args: Any) -> Quanta:
            for quantum in generator(*args):
                yield quantum  # announced; what follows happens in the quantum itself
                self.labels.append(quantum.kind)
                self.on_quantum(len(self.labels))

        return counted


@contextmanager
def schedulers(run_dir: Path, model: Path) -> Iterator["Make"]:
    """Give a function that makes toy schedulers; they are closed at the end."""
    made: list[ToyScheduler] = []

    def build(**settings: Any) -> ToyScheduler:
        made.append(ToyScheduler(run_dir, model, **settings))
        return made[-1]

    yield build
    for scheduler in made:
        scheduler.close()


Make = Callable[..., ToyScheduler]


class Grants:
    """A governor that allows a set number of quanta per iteration, each of which is said to take a second."""

    def __init__(self) -> None:
        self.slo = None
        self.per_iteration = 4
        self.rest_s = 0.0
        self.finished_requests: list[Finished] = []
        self.iterations: list[Batch] = []

    def budget(self, load: Load, now: float) -> float:
        return float(self.per_iteration)

    def wait(self, now: float) -> float:
        return self.rest_s

    def ran(self, seconds: float, now: float) -> None:
        pass

    def iterated(self, batch: Batch, seconds: float) -> None:
        self.iterations.append(batch)

    def finished(self, request: Finished, now: float) -> None:
        self.finished_requests.append(request)


def request(rid: str, answered: int = 0, prompt: int = 5, priority: int | None = None) -> Any:
    """Make a request as the scheduler holds it."""
    req = SimpleNamespace(
        rid=rid, origin_input_ids=[1] * prompt, output_ids=[1] * answered, priority=priority, finished_reason=None,
        cached_tokens=0,
    )  # fmt: skip
    req.finished = lambda: req.finished_reason is not None
    return req


def write_data(path: Path, rows: int = 6) -> None:
    generator = np.random.default_rng(0)
    ids = generator.integers(8, 400, (rows, SEQ_LEN)).tolist()
    token_file.write(path, [(row, [token_file.NO_LOSS] * 6 + row[6:]) for row in ids], seq_len=SEQ_LEN, pad_id=0)


def random_adapter(model: Path, rank: int = RANK) -> bytes:
    generator = np.random.default_rng(1)
    tensors: peft_dir.Tensors = {}
    for module, (out, inner) in linear_shapes(model, LINEARS).items():
        tensors[peft_dir.key(module, "A")] = (generator.standard_normal((rank, inner)) * 0.1).astype(np.float32)
        tensors[peft_dir.key(module, "B")] = (generator.standard_normal((out, rank)) * 0.1).astype(np.float32)
    return peft_dir.encode(tensors)
