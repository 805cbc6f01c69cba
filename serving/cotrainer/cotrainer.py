"""`CoTrainer`: trains LoRA adapters between the iterations of SGLang's scheduler, one job and one quantum at a time.

Everything runs on the scheduler's only thread, so there is no lock, and serving is held up by one quantum at most.
`hooks.py` calls it before each iteration and in place of an idle engine's sleep; the daemon sends commands by a socket.
"""

import logging
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch

from serving.cotrainer.base_view import engine_storages, view_of
from serving.cotrainer.commands import CommandSocket, read_command
from serving.cotrainer.counts import Counts
from serving.cotrainer.governor import Governor, Load, SloGovernor
from serving.cotrainer.job import Job
from serving.cotrainer.lanes import lane_on
from serving.cotrainer.lanes.lane import CpuLane, Lane
from serving.cotrainer.lanes.streams import Streams
from serving.cotrainer.memory import Footprint, give_back
from serving.cotrainer.observer import Observer
from serving.cotrainer.quantum import Pieces, Quantum
from serving.cotrainer.trainer import LoraTrainer
from serving.cotrainer.tuning import Tuning
from serving.trainer_socket import CancelJob, CoTrainerSettings, CoTrainerStatus, EvaluateJob, SloStatus, TrainJob
from umbel.errors import TrainingError, UmbelError
from umbel.messages import JobState

HOUSEKEEPING_S = 1.0
"""Longest time in the idle hook: SGLang's idle loop sleeps at most this long between two rounds of its housekeeping."""
LOOK_S = 1e-3
"""Longest time in which an idle engine that waits for a quantum on the device does not look for requests."""

clock = time.perf_counter  # the clock that SGLang uses
logger = logging.getLogger(__name__)


class CoTrainer:
    """Runs one job inside the engine, in the time that the governor allows.

    A subclass may override `obey`, `tune` and `advance`; the benchmark's baselines do.
    """

    def __init__(self, settings: CoTrainerSettings, run_dir: Path) -> None:
        self.settings = settings
        self.commands = CommandSocket(run_dir)
        self.tuning = Tuning(settings, run_dir)
        self.predictor = self.tuning.predictor
        self.governor: Governor = SloGovernor(
            None, self.predictor, share_floor=settings.share_floor, share_cap=settings.share_cap
        )
        self.observer = Observer()
        self.counts = Counts()
        self.footprint = Footprint()
        self.lane: Lane = CpuLane()
        self.idle_poller: Any = None
        """The scheduler's own poller, with the command socket registered; set by whoever makes the co-trainer."""
        self.streams: Streams = {}
        """The engine's CUDA streams, set likewise; training's own joins them."""
        self.trainer: LoraTrainer | None = None
        """None until `build` has succeeded; `unavailable` says why."""
        self.unavailable = "the co-trainer is still being built"
        self.job: Job | None = None
        """The last job, whether it still runs or has ended."""
        self._outstanding: deque[tuple[Job, Quantum, bool]] = deque()
        """Quanta that were launched and are not yet counted: of which job, and whether the engine was busy."""
        self._busy = False

    def build(self, served: torch.nn.Module, model_path: str) -> None:
        """Make the trainer over views of the served weights and time its quanta, so that no memory is missing later.

        Raises UnsupportedModel for a model that cannot be viewed, TrainingError where a frozen parameter is not the
        engine's own or memory does not suffice.
        """
        self.unavailable = "the co-trainer could not be built"  # the reason until the build has succeeded
        footprint, settings = self.footprint, self.settings
        give_back()
        footprint.measure("before")
        model = view_of(served, model_path)
        footprint.measure("view")
        trainer = LoraTrainer(
            model,
            max_rank=settings.max_rank,
            target_modules=settings.target_modules,
            seq_len=settings.seq_len,
            pieces=Pieces.whole(settings.micro_batch, settings.seq_len),
        )
        storages = engine_storages(served)
        shared = sum(tensor.untyped_storage().data_ptr() in storages for tensor in trainer.frozen.values())
        footprint.shared_tensors = shared
        if shared != len(trainer.frozen):
            raise TrainingError(f"only {shared} of {len(trainer.frozen)} frozen tensors are the engine's own")
        self.lane = lane_on(model.device, self.streams, self.tuning.beside(trainer))
        footprint.measure("lora")
        self.tuning.calibrate(trainer, model_path, self.lane)
        self.governor.slo = self.tuning.slo
        footprint.measure("calibration")
        give_back()
        footprint.measure("after")
        self.trainer, self.unavailable = trainer, ""
        logger.info("co-trainer ready: %d tensors are the engine's, %d bytes its own", shared, trainer.state_bytes)

    def between_iterations(self, scheduler: Any) -> None:
        """Before an iteration: learn from the last one, and run the quanta that the governor allows.

        A request that waits meets one at most, whether it runs already or is launched now.
        """
        now = clock()
        self._serve_commands()
        self._count_ended()
        arrivals = self.observer.arrivals
        load, iterations, finished = self.observer.look(scheduler, now)
        self.counts.settle(self.observer.arrivals > arrivals)
        for iteration in iterations:
            batch, seconds, trained = iteration.batch, iteration.seconds, iteration.trained
            self.governor.iterated(batch, seconds - self.predictor.overlap * trained)
            if iteration.clean:
                self.predictor.observe(batch, seconds)
            else:
                self.predictor.observe_beside(batch, seconds, trained, iteration.settled)
        for request in finished:
            self.governor.finished(request, now)
        if load.idle or self.runnable() is None:
            return
        self.counts.hook_calls["busy"] += 1
        self.tune(now)
        self._train_within(self.governor.budget(load, now), load)

    def instead_of_sleep(self) -> bool:
        """Run quanta until a request comes; return False if there is no job and the scheduler may sleep."""
        self._serve_commands()
        if self.runnable() is None:
            return False
        self.counts.hook_calls["idle"] += 1
        self.tune(clock(), idle=True)
        until = clock() + HOUSEKEEPING_S
        ran = False
        while self.runnable() is not None and clock() < until:
            if self._requests_arrived(min(HOUSEKEEPING_S, self.governor.wait(clock()))):
                self.counts.stopped(by_arrival=ran)
                return True
            self.observer.nothing_came(clock())
            self._serve_commands()
            self._count_ended()
            if not self.lane.ready():
                self.lane.wait(LOOK_S)
            elif ran := self.governor.wait(clock()) <= 0 and self.runnable() is not None:
                self.advance()
        return True

    def fail(self, error: Exception) -> None:
        """End the job, or note that none will ever run, with the reason."""
        if self.trainer is None:
            self.unavailable = f"{self.unavailable}: {error}"
        if self.job is not None:
            self.job.finish(JobState.FAILED, str(error) or type(error).__name__)

    def runnable(self) -> Job | None:
        """Return the job if it still has quanta to run."""
        return self.job if self.job is not None and self.job.quanta is not None else None

    def advance(self) -> bool:
        """Advance the job by one quantum; return False if it has ended. May be overridden."""
        job = self.runnable()
        if job is None or job.next is None:
            return False
        quantum = job.next
        try:
            self.lane.run(job.advance)
        except UmbelError as error:
            job.finish(JobState.FAILED, str(error))
            return False
        self.observer.launched()
        self._outstanding.append((job, quantum, self._busy))
        self._count_ended()
        return job.next is not None

    def obey(self, payload: bytes) -> None:
        """Carry out one message of the daemon's. May be overridden.

        Raises WireError for one that is not understood, TrainingError for a job that cannot be started.
        """
        command = read_command(payload)
        if isinstance(command, CancelJob) and self.job is not None and self.job.id == command.id:
            self.job.finish(JobState.CANCELLED, "cancelled")
        if not isinstance(command, TrainJob | EvaluateJob):
            return
        if self.trainer is None:
            raise TrainingError(self.unavailable)
        if self.runnable() is not None and self.job is not None and self.job.id != command.id:
            raise TrainingError(f"busy with job {self.job.id}")
        if self.job is None or self.job.id != command.id:
            self.tuning.save()
            self.tune(clock())
            self.job = Job(command, self.trainer)

    def tune(self, now: float, idle: bool = False) -> None:
        """Set the targets once they are known, and the pieces that fit them. May be overridden."""
        self._busy = not idle
        assert self.trainer is not None
        if self.tuning.resize(self.trainer, now):
            self.governor.slo = self.tuning.slo
        self.trainer.pieces = (self.tuning.idle_pieces if idle else self.tuning.pieces) or self.trainer.pieces

    def status(self, error: str = "") -> CoTrainerStatus:
        """Return the state of the co-trainer and its job; with `error`, the refusal of a message instead of the job."""
        trainer, job = self.trainer, self.job
        common: dict[str, Any] = {
            "quanta": self.counts.quanta,
            "longest_quantum_s": self.predictor.longest_quantum(),
            "pieces": {name: int(size) for name, size in vars(trainer.pieces).items()} if trainer else {},
            "slo": _slo_status(self.governor),
            "latency_known": self.predictor.ready,
            "preemption": self.counts.preemption(self.observer.arrivals),
            "overlap": self.predictor.overlap,
            "streams": {name: stream.priority for name, stream in self.streams.items()},
            "hook_calls": self.counts.hook_calls,
            "most_quanta_while_waiting": self.counts.most_while_waiting,
            "shared_tensors": self.footprint.shared_tensors,
            "frozen_tensors": len(trainer.frozen) if trainer else 0,
            "state_bytes": trainer.state_bytes if trainer else 0,
            "reserved_mb": self.settings.memory_mb,
            "kv_tokens_given_up": self.footprint.kv_tokens_given_up,
            "memory": self.footprint.private,
        }
        if job is None or error:
            return CoTrainerStatus(error=error or self.unavailable, **common)
        return CoTrainerStatus(**job.figures(), **common)

    def _train_within(self, budget: float, load: Load) -> None:
        """Launch quanta that fit into `budget` seconds by their P99, until a request arrives.

        Nothing is launched behind an outstanding quantum, or while a request waits that has met one in this call.
        """
        met = 0 if self.lane.ready() else 1
        while (job := self.runnable()) is not None and job.next is not None:
            # A kind of quantum never seen counts as 0 s; it may still not run while the gate is closed.
            if budget <= 0 or self.predictor.quantum_high(job.next) > budget or not self.lane.ready():
                break
            arrived = self._requests_arrived(0)
            if met and (load.waiting or arrived):
                self.counts.stopped(by_arrival=arrived)
                break
            if not self.advance():
                break
            met += 1
            budget -= self.counts.last_quantum_s
            if load.waiting or arrived:
                self.counts.most_while_waiting = max(self.counts.most_while_waiting, met)

    def _count_ended(self) -> None:
        """Count the quanta that have ended since the last look, each with its job, which ends with its last one."""
        for took in self.lane.ended():
            job, quantum, busy = self._outstanding.popleft()
            self.counts.ran(quantum.kind, took)
            self.predictor.observe_quantum(quantum, took.seconds, busy)
            self.governor.ran(took.seconds, clock())
            self.observer.ended(took.seconds)
            job.busy_s += took.seconds
            if job.next is None and job.quanta is not None:
                job.end()

    def _requests_arrived(self, timeout_s: float) -> bool:
        """Wait at most `timeout_s` for a request on one of the scheduler's sockets; return whether there is one."""
        events = self.idle_poller.poll(timeout_s * 1000)
        return any(socket is not self.commands.socket for socket, _ in events)

    def _serve_commands(self) -> None:
        """Carry out and answer at most one message of the daemon's."""
        message = self.commands.receive()
        if message is None:
            return
        error = ""
        try:
            self.obey(message.payload)
        except UmbelError as refusal:
            error = str(refusal)
        self.commands.reply(message, self.status(error))


def _slo_status(governor: Governor) -> SloStatus | None:
    """Return the targets and margins of an SloGovernor; None for another, and before there are targets."""
    slo = governor.slo
    if slo is None or not isinstance(governor, SloGovernor):
        return None
    return SloStatus(
        ttft_ms=slo.ttft_s * 1000,
        ttft_ms_per_token=slo.ttft_per_token_s * 1000,
        tpot_ms=slo.tpot_s * 1000,
        quantile=slo.quantile,
        margin_ttft=governor.margin_ttft.value,
        margin_tpot=governor.margin_tpot.value,
        debt_s=governor.slo_debt_s,
        answered=governor.answered,
        met=governor.met,
    )
