"""The co-trainer: the scheduler's iterations on one side, the trainer's quanta on the other, the daemon between.

It runs on the scheduler's only thread, so there is no lock, and the longest that serving can be held up is one quantum.
"""

import logging
import time
from collections import deque
from pathlib import Path
from typing import Any, Literal

import torch
import zmq

from serving.cotrainer.governor import Governor, Load, SloGovernor
from serving.cotrainer.job import Job
from serving.cotrainer.lane import CpuLane, CudaLane, Lane
from serving.cotrainer.memory import give_back, private_bytes
from serving.cotrainer.observer import Observer
from serving.cotrainer.quantum import Pieces, Quantum
from serving.cotrainer.trainer import LoraTrainer
from serving.cotrainer.tuning import Tuning
from serving.trainer_socket import (
    CancelJob,
    CoTrainerSettings,
    CoTrainerStatus,
    EvaluateJob,
    PreemptionStats,
    QuantumStats,
    SloStatus,
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

clock = time.perf_counter  # SGLang's, too
logger = logging.getLogger(__name__)


class CoTrainer:
    """One job at a time, a quantum at a time."""

    def __init__(self, settings: CoTrainerSettings, run_dir: Path) -> None:
        self.settings = settings
        self.tuning = Tuning(settings, run_dir)
        self.predictor = self.tuning.predictor
        self.governor: Governor = SloGovernor(
            None, self.predictor, share_floor=settings.share_floor, share_cap=settings.share_cap
        )
        self.observer = Observer()
        self.lane: Lane = CpuLane()
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        address = socket_path(run_dir)
        address.unlink(missing_ok=True)
        self.socket.bind(f"ipc://{address}")
        self.idle_poller: Any = None
        self.trainer: LoraTrainer | None = None
        self.unavailable = "the co-trainer is still being built"
        self.shared = 0
        self.memory: dict[str, int] = {}
        self.kv_tokens_given_up = 0
        self.job: Job | None = None
        self.stats: dict[str, QuantumStats] = {}
        self.hook_calls: dict[Literal["busy", "idle"], int] = {"busy": 0, "idle": 0}
        self.most_while_waiting = 0
        self.preemptions: deque[float] = deque(maxlen=4096)
        self.preempted = 0
        self._last_quantum_s = 0.0
        self._cut_short: float | None = None
        """The quantum in whose course something arrived."""
        self._in_flight: deque[Quantum] = deque()

    def build(self, served: torch.nn.Module, model_path: str) -> None:
        """Make the trainer over views of the served weights and time its quanta, so that no memory is missing later."""
        from serving.cotrainer.base_view import view_of

        self.unavailable = "the co-trainer could not be built"  # unless we get to the end
        give_back()
        self.memory["before"] = private_bytes()
        model = view_of(served, model_path)
        self.memory["view"] = private_bytes()
        settings = self.settings
        trainer = LoraTrainer(
            model,
            max_rank=settings.max_rank,
            target_modules=settings.target_modules,
            seq_len=settings.seq_len,
            pieces=Pieces.whole(settings.micro_batch, settings.seq_len),
        )
        engine_storages = {weight.untyped_storage().data_ptr() for weight in served.parameters()}
        self.shared = sum(w.untyped_storage().data_ptr() in engine_storages for w in trainer.frozen.values())
        if self.shared != len(trainer.frozen):
            raise TrainingError(f"only {self.shared} of {len(trainer.frozen)} frozen parameters are the engine's own")
        if model.device.type == "cuda":
            self.lane = CudaLane(model.device)
        self.memory["lora"] = private_bytes()
        self.tuning.calibrate(trainer, model_path, self.lane)
        self.governor.slo = self.tuning.slo
        self.memory["calibration"] = private_bytes()
        give_back()
        self.memory["after"] = private_bytes()
        per_token = kv_bytes_per_token(model.config, model.dtype.itemsize)
        self.kv_tokens_given_up = ((settings.memory_mb or 0) << 20) // per_token
        self.trainer, self.unavailable = trainer, ""
        logger.info(
            "co-trainer ready: %d tensors shared with the engine, %d bytes of its own; %s MB kept for training, "
            "%d tokens of KV cache", self.shared, trainer.state_bytes, settings.memory_mb or 0, self.kv_tokens_given_up,
        )  # fmt: skip

    def between_iterations(self, scheduler: Any) -> None:
        """What the governor allows, and while a request waits never more than one quantum."""
        now = clock()
        self._serve_socket()
        arrivals = self.observer.arrivals
        load, iteration, finished = self.observer.look(scheduler, now)
        self._note_preemption(self.observer.arrivals > arrivals)
        if iteration is not None:
            self.predictor.observe(iteration.batch, iteration.seconds, iteration.trained)
            self.governor.iterated(iteration.batch, iteration.seconds - iteration.trained)
        for request in finished:
            self.governor.finished(request)
        if load.idle or self._runnable() is None:
            return
        self.hook_calls["busy"] += 1
        self._tune(now)
        self._train_within(self.governor.budget(load, now), load)

    def instead_of_sleep(self) -> bool:
        """Quanta until a request comes; False when there is nothing to train and the scheduler may sleep."""
        self._serve_socket()
        if self._runnable() is None:
            return False
        self.hook_calls["idle"] += 1
        self._tune(clock(), idle=True)
        until = clock() + HOUSEKEEPING_S
        ran = False
        while self._runnable() is not None and clock() < until:
            if self._requests_arrived(min(HOUSEKEEPING_S, self.governor.wait(clock()))):
                self._cut_short = self._last_quantum_s if ran else None
                return True
            self.observer.nothing_came(clock())
            self._serve_socket()
            ran = self.governor.wait(clock()) <= 0 and self._runnable() is not None
            if ran:
                self._advance()
        return True

    def fail(self, error: Exception) -> None:
        """Let the job go and say why."""
        if self.trainer is None:
            self.unavailable = f"{self.unavailable}: {error}"
        if self.job is not None:
            self.job.finish(JobState.FAILED, str(error) or type(error).__name__)

    def _train_within(self, budget: float, load: Load) -> None:
        """Quanta that fit into `budget` seconds by their P99, until a request arrives."""
        ran = 0
        while (job := self._runnable()) is not None and job.next is not None:
            # Of a kind of quantum never seen nothing is known, and it may still not run while the gate is closed.
            if budget <= 0 or self.predictor.quantum_high(job.next) > budget or not self.lane.ready():
                return
            arrived = self._requests_arrived(0)
            if ran and (load.waiting or arrived):
                self._cut_short = self._last_quantum_s if arrived else None
                return
            if not self._advance():
                return
            ran += 1
            budget -= self._last_quantum_s
            if load.waiting or arrived:
                self.most_while_waiting = max(self.most_while_waiting, ran)

    def _runnable(self) -> Job | None:
        return self.job if self.job is not None and self.job.quanta is not None else None

    def _advance(self) -> bool:
        """Advance the job by one quantum; False when it has ended."""
        job = self._runnable()
        if job is None or job.next is None:
            return False
        quantum = job.next
        try:
            self.lane.run(job.advance)
        except UmbelError as error:
            job.finish(JobState.FAILED, str(error))
            return False
        self._in_flight.append(quantum)
        for seconds in self.lane.elapsed():
            self._count(job, self._in_flight.popleft(), seconds)
        if job.next is None:
            job.end()
            return False
        return True

    def _count(self, job: Job, quantum: Quantum, seconds: float) -> None:
        self._last_quantum_s = seconds
        self.predictor.observe_quantum(quantum, seconds)
        self.governor.ran(seconds, clock())
        self.observer.trained += seconds
        job.busy_s += seconds
        known = self.stats.get(quantum.kind, QuantumStats())
        self.stats[quantum.kind] = QuantumStats(
            count=known.count + 1, seconds=known.seconds + seconds, longest_s=max(known.longest_s, seconds)
        )

    def _note_preemption(self, requests_came: bool) -> None:
        """Training was cut short by what lay on the scheduler's socket: a request, or only a message."""
        if self._cut_short is not None and requests_came:
            self.preempted += 1
            self.preemptions.append(self._cut_short)
        self._cut_short = None

    def _requests_arrived(self, timeout_s: float) -> bool:
        """Whether a request lies on one of the scheduler's sockets, waiting at most `timeout_s` for one."""
        events = self.idle_poller.poll(timeout_s * 1000)
        return any(socket is not self.socket for socket, _ in events)

    def _serve_socket(self) -> None:
        if not int(self.socket.get(zmq.EVENTS)) & zmq.POLLIN:
            return
        sender, *frames = self.socket.recv_multipart(zmq.NOBLOCK)
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
            self.tuning.save()
            self._tune(clock())
            self.job = Job(message, self.trainer)

    def _tune(self, now: float, idle: bool = False) -> None:
        """Targets once they are known, and pieces that fit them with the engine as busy as it is."""
        assert self.trainer is not None
        if self.tuning.resize(self.trainer, now):
            self.governor.slo = self.tuning.slo
        self.trainer.pieces = (self.tuning.idle_pieces if idle else self.tuning.pieces) or self.trainer.pieces

    def _status(self, error: str) -> CoTrainerStatus:
        trainer, job = self.trainer, self.job
        common: dict[str, Any] = {
            "quanta": self.stats,
            "longest_quantum_s": self.predictor.longest_quantum(),
            "pieces": {name: int(size) for name, size in vars(trainer.pieces).items()} if trainer else {},
            "slo": _slo_status(self.governor),
            "latency_known": self.predictor.ready,
            "preemption": self._preemption(),
            "overlap": self.predictor.overlap,
            "hook_calls": self.hook_calls,
            "most_quanta_while_waiting": self.most_while_waiting,
            "shared_tensors": self.shared,
            "frozen_tensors": len(trainer.frozen) if trainer else 0,
            "state_bytes": trainer.state_bytes if trainer else 0,
            "kv_tokens_given_up": self.kv_tokens_given_up,
            "memory": self.memory,
        }
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
            evaluation=job.evaluations[0].sums if job.evaluations else None,
            **common,
        )

    def _preemption(self) -> PreemptionStats:
        waits = sorted(self.preemptions) or [0.0]
        return PreemptionStats(
            arrivals=self.observer.arrivals,
            count=self.preempted,
            p50_s=waits[len(waits) // 2],
            p99_s=waits[int(len(waits) * 0.99)],
            longest_s=waits[-1],
        )


def _slo_status(governor: Governor) -> SloStatus | None:
    slo = governor.slo
    if slo is None or not isinstance(governor, SloGovernor):
        return None
    return SloStatus(
        ttft_ms=slo.ttft_s * 1000,
        tpot_ms=slo.tpot_s * 1000,
        quantile=slo.quantile,
        margin_ttft=governor.margin_ttft,
        margin_tpot=governor.margin_tpot,
        debt_s=governor.slo_debt_s,
        answered=governor.answered,
        met=governor.met,
    )


def kv_bytes_per_token(config: Any, itemsize: int) -> int:
    """Keys and values of one token in every layer."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * itemsize)
