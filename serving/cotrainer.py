"""The co-trainer: SGLang's scheduler hooks on one side, the trainer's quanta on the other, the daemon's socket between.

It runs on the scheduler's only thread, so there is no lock, and the longest that serving can be held up is one quantum.
Every hook body catches everything: a failure costs the job, never the engine.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import zmq

from serving.governor import FixedGovernor, Load
from serving.job import Job
from serving.memory import give_back, private_bytes
from serving.trainer import LoraTrainer
from serving.trainer_socket import (
    CancelJob,
    CoTrainerSettings,
    CoTrainerStatus,
    EvaluateJob,
    QuantumStats,
    StatusQuery,
    TrainJob,
    socket_path,
)
from umbel import wire
from umbel.errors import TrainingError, UmbelError, WireError
from umbel.messages import JobState

HOUSEKEEPING_S = 1.0
"""SGLang's idle loop sleeps at most this long between two rounds of its housekeeping; so do we."""
JOBS = {body.__name__: body for body in (TrainJob, EvaluateJob, StatusQuery, CancelJob)}

logger = logging.getLogger(__name__)


class Hooks:
    """What `serving.plugin` registers on SGLang's Scheduler. Without `trainer.json` the engine only serves."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.cotrainer: CoTrainer | None = None

    def after_init(self, result: None, scheduler: Any, *args: Any, **kwargs: Any) -> None:
        """AFTER `Scheduler.__init__`: build and warm up the trainer, before the engine reports ready."""
        try:
            settings = CoTrainerSettings.read(self.run_dir)
            if settings is None:
                return
            cotrainer = CoTrainer(settings, socket_path(self.run_dir))
            scheduler.idle_sleeper.poller.register(cotrainer.socket, zmq.POLLIN)
            cotrainer.idle_poller = scheduler.idle_sleeper.poller
            self.cotrainer = cotrainer
            cotrainer.build(scheduler.tp_worker.model_runner.model, scheduler.server_args.model_path)
        except Exception as error:
            self._give_up(error)

    def before_iteration(self, scheduler: Any, *args: Any, **kwargs: Any) -> None:
        """BEFORE `Scheduler.get_next_batch_to_run`, which fires every iteration, idle or busy."""
        if self.cotrainer is None:
            return
        try:
            running = scheduler.running_batch
            load = Load(
                running=0 if running is None else len(running.reqs) + (scheduler.last_batch is not None),
                waiting=len(scheduler.waiting_queue),
            )
            self.cotrainer.between_iterations(load)
        except Exception as error:
            self._give_up(error)

    def around_sleep(self, sleep: Callable[..., None], scheduler: Any, *args: Any, **kwargs: Any) -> None:
        """AROUND `Scheduler.maybe_sleep_on_idle`, the only place where an idle scheduler sleeps."""
        try:
            trained = self.cotrainer is not None and self.cotrainer.instead_of_sleep()
        except Exception as error:
            trained = False
            self._give_up(error)
        if not trained:
            sleep(scheduler, *args, **kwargs)

    def _give_up(self, error: Exception) -> None:
        logger.exception("co-training failed; serving goes on")
        if self.cotrainer is not None:
            self.cotrainer.fail(error)


class CoTrainer:
    """One job at a time, a quantum at a time."""

    def __init__(self, settings: CoTrainerSettings, address: Path) -> None:
        self.settings = settings
        self.governor = FixedGovernor(settings.quanta_per_iteration, settings.share_cap)
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        address.unlink(missing_ok=True)
        self.socket.bind(f"ipc://{address}")
        self.idle_poller: Any = None
        self.trainer: LoraTrainer | None = None
        self.unavailable = "the co-trainer is still being built"
        self.shared = 0
        self.memory: dict[str, int] = {}
        self.job: Job | None = None
        self.stats: dict[str, QuantumStats] = {}
        self.hook_calls: dict[Literal["busy", "idle"], int] = {"busy": 0, "idle": 0}
        self.most_while_waiting = 0

    def build(self, served: torch.nn.Module, model_path: str) -> None:
        """Make the trainer over views of the served weights and take one step, so that no memory is missing later."""
        from serving.base_view import view_of

        self.unavailable = "the co-trainer could not be built"  # unless we get to the end
        give_back()
        self.memory["before"] = private_bytes()
        model = view_of(served, model_path)
        self.memory["view"] = private_bytes()
        trainer = LoraTrainer(
            model,
            max_rank=self.settings.max_rank,
            target_modules=self.settings.target_modules,
            micro_batch=self.settings.micro_batch,
            seq_len=self.settings.seq_len,
            head_tokens=self.settings.head_tokens,
        )
        engine_storages = {weight.untyped_storage().data_ptr() for weight in served.parameters()}
        self.shared = sum(w.untyped_storage().data_ptr() in engine_storages for w in trainer.frozen.values())
        if self.shared != len(trainer.frozen):
            raise TrainingError(f"only {self.shared} of {len(trainer.frozen)} frozen parameters are the engine's own")
        self.memory["lora"] = private_bytes()
        for label, seconds in trainer.warm_up().items():
            self.stats[label] = QuantumStats(longest_s=seconds)
        self.memory["warm_up"] = private_bytes()
        give_back()
        self.memory["after"] = private_bytes()
        self.trainer, self.unavailable = trainer, ""
        logger.info(
            "co-trainer ready: %d tensors shared with the engine, %d bytes of its own", self.shared, trainer.state_bytes
        )

    def between_iterations(self, load: Load) -> None:
        """At most the governor's number of quanta, and never a second one while a request waits."""
        self._serve_socket()
        if not (load.running or load.waiting) or self._runnable() is None:
            return
        self.hook_calls["busy"] += 1
        for ran in range(1, 1 + self.governor.quanta(load, time.monotonic())):
            waiting = load.waiting > 0 or self._requests_arrived(0)
            if waiting and ran > 1:
                break
            if waiting:
                self.most_while_waiting = max(self.most_while_waiting, ran)
            if not self._run_quantum():
                break

    def instead_of_sleep(self) -> bool:
        """Quanta until a request comes; False when there is nothing to train and the scheduler may sleep."""
        self._serve_socket()
        if self._runnable() is None:
            return False
        self.hook_calls["idle"] += 1
        until = time.monotonic() + HOUSEKEEPING_S
        while self._runnable() is not None and time.monotonic() < until:
            if self._requests_arrived(min(HOUSEKEEPING_S, self.governor.wait(time.monotonic()))):
                return True
            self._serve_socket()
            if self.governor.wait(time.monotonic()) <= 0:
                self._run_quantum()
        return True

    def fail(self, error: Exception) -> None:
        """Let the job go and say why."""
        if self.trainer is None:
            self.unavailable = f"{self.unavailable}: {error}"
        if self.job is not None:
            self.job.finish(JobState.FAILED, str(error) or type(error).__name__)

    def _runnable(self) -> Job | None:
        return self.job if self.job is not None and self.job.quanta is not None else None

    def _run_quantum(self) -> bool:
        """Advance the job by one quantum; False when it has ended."""
        job = self._runnable()
        if job is None or job.quanta is None:
            return False
        began = time.monotonic()
        try:
            label = next(job.quanta, None)
        except UmbelError as error:
            job.finish(JobState.FAILED, str(error))
            return False
        ended = time.monotonic()
        if label is None:
            job.end()
            return False
        seconds = ended - began
        self.governor.ran(seconds, ended)
        job.busy_s += seconds
        known = self.stats.get(label, QuantumStats())
        self.stats[label] = QuantumStats(
            count=known.count + 1, seconds=known.seconds + seconds, longest_s=max(known.longest_s, seconds)
        )
        return True

    def _requests_arrived(self, timeout_s: float) -> bool:
        """Whether a request lies on one of the scheduler's sockets, waiting at most `timeout_s` for one."""
        events = self.idle_poller.poll(timeout_s * 1000)
        return any(socket is not self.socket for socket, _ in events)

    def _serve_socket(self) -> None:
        try:
            sender, *frames = self.socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return
        error = ""
        try:
            self._obey(b"".join(frames))
        except UmbelError as refusal:
            error = str(refusal)
        self.socket.send_multipart([sender, wire.pack_model(self._status(error))], zmq.NOBLOCK)

    def _obey(self, payload: bytes) -> None:
        kind, _ = wire.unpack(payload)
        if kind not in JOBS:
            raise WireError(f"unknown message {kind!r}")
        message = wire.unpack_model(payload, JOBS[kind])
        if isinstance(message, CancelJob) and self.job is not None and self.job.id == message.id:
            self.job.finish(JobState.CANCELLED, "cancelled")
        if not isinstance(message, TrainJob | EvaluateJob):
            return
        if self.trainer is None:
            raise TrainingError(self.unavailable)
        if self._runnable() is not None and self.job is not None and self.job.id != message.id:
            raise TrainingError(f"busy with job {self.job.id}")
        if self.job is None or self.job.id != message.id:
            self.job = Job(message, self.trainer)

    def _status(self, error: str) -> CoTrainerStatus:
        common: dict[str, Any] = {
            "quanta": self.stats,
            "hook_calls": self.hook_calls,
            "most_quanta_while_waiting": self.most_while_waiting,
            "shared_tensors": self.shared,
            "frozen_tensors": len(self.trainer.frozen) if self.trainer else 0,
            "state_bytes": self.trainer.state_bytes if self.trainer else 0,
            "memory": self.memory,
        }
        job = self.job
        if job is None or error:
            return CoTrainerStatus(error=error or self.unavailable, **common)
        return CoTrainerStatus(
            job=job.id,
            state=job.state,
            error=job.error,
            steps=job.progress.steps,
            examples=job.progress.examples,
            loss_tokens=job.progress.loss_tokens,
            loss_sum=job.progress.loss_sum,
            seconds=job.seconds,
            share=min(1.0, job.busy_s / job.seconds) if job.seconds else 0.0,
            evaluation=job.evaluations[0] if job.evaluations else None,
            **common,
        )
