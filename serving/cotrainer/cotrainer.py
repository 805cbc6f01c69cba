"""`CoTrainer`: trains LoRA adapters between the iterations of SGLang's scheduler, a quantum at a time, jobs in turns.

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
from serving.cotrainer.jobs.in_turns import JobsInTurns
from serving.cotrainer.jobs.job import Job
from serving.cotrainer.lanes import lane_on
from serving.cotrainer.lanes.lane import CpuLane, Lane
from serving.cotrainer.lanes.streams import Streams
from serving.cotrainer.memory import Footprint, give_back
from serving.cotrainer.observer import Observer
from serving.cotrainer.quantum import Pieces, Quantum
from serving.cotrainer.slo_status import slo_status
from serving.cotrainer.trainer import LoraTrainer
from serving.cotrainer.tuning import Tuning
from serving.trainer_socket import CancelJob, CoTrainerSettings, CoTrainerStatus, StatusQuery
from umbel.errors import TrainingError, UmbelError
from umbel.messages import JobState

HOUSEKEEPING_S = 1.0
"""Longest time in the idle hook: SGLang's idle loop sleeps at most this long between two rounds of its housekeeping."""
LOOK_S = 1e-3
"""Longest time in which an idle engine that waits for a quantum on the device does not look for requests."""

clock = time.perf_counter  # the clock that SGLang uses
logger = logging.getLogger(__name__)


class CoTrainer:
    """Runs jobs inside the engine, in the time that the governor allows.

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
        self.jobs = JobsInTurns()
        self._outstanding: deque[tuple[Job | None, Quantum, bool]] = deque()
        """Quanta that were launched and are not yet counted: of which job (None: a swap), and whether the engine was
        busy."""
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
            adapters=settings.adapters,
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
        """End the job that has the turn, or note that none will ever run, with the reason."""
        if self.trainer is None:
            self.unavailable = f"{self.unavailable}: {error}"
        self.jobs.fail(str(error) or type(error).__name__)
        self._pass_turn()

    @property
    def job(self) -> Job | None:
        """Return the job that has the turn, or had it last, whether it still runs or has ended."""
        return self.jobs.holder

    def runnable(self) -> Job | None:
        """Return the job that has the turn; None where no job has quanta to run."""
        return self.jobs.runnable

    def advance(self) -> bool:
        """Run one quantum of the job that has the turn; return False if it has ended. May be overridden."""
        self._count_ended()  # the turn may be over with it
        job, quantum = self.jobs.runnable, self.jobs.next
        if job is None or quantum is None:
            return False
        try:
            of = self.lane.run(self.jobs.advance)
        except UmbelError as error:
            self.fail(error)
            return False
        self.observer.launched()
        self._outstanding.append((of, quantum, self._busy))
        self._count_ended()
        return job.next is not None

    def obey(self, payload: bytes) -> Job | None:
        """Carry out one message of the daemon's; return the job that the answer is about. May be overridden.

        Raises WireError for one that is not understood, TrainingError for a job that cannot be started.
        """
        command = read_command(payload)
        if isinstance(command, StatusQuery):
            return self.job if command.id is None else self.jobs.find(command.id)
        job = self.jobs.find(command.id)
        if isinstance(command, CancelJob):
            if job is not None:
                job.finish(JobState.CANCELLED, "cancelled")
                self._pass_turn()
            return job
        if self.trainer is None:
            raise TrainingError(self.unavailable)
        if job is None:
            self.tuning.save()
            self.tune(clock())
            job = self.jobs.start(command, self.trainer)
            self._pass_turn()
        return job

    def tune(self, now: float, idle: bool = False) -> None:
        """Set the targets once they are known, and the pieces that fit them. May be overridden."""
        self._busy = not idle
        assert self.trainer is not None
        if self.tuning.resize(self.trainer, now):
            self.governor.slo = self.tuning.slo
        self.trainer.pieces = (self.tuning.idle_pieces if idle else self.tuning.pieces) or self.trainer.pieces

    def status(self, job: Job | None = None, error: str = "") -> CoTrainerStatus:
        """Return the state of the co-trainer and of a job; with `error`, the refusal of a message in its place."""
        trainer = self.trainer
        common: dict[str, Any] = {
            "open_jobs": self.jobs.open,
            "turns": self.jobs.handed_over,
            "parked_bytes": self.jobs.parked_bytes,
            "quanta": self.counts.quanta,
            "longest_quantum_s": self.predictor.longest_quantum(),
            "pieces": {name: int(size) for name, size in vars(trainer.pieces).items()} if trainer else {},
            "slo": slo_status(self.governor),
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
        while (quantum := self.jobs.next) is not None:
            # A kind of quantum never seen counts as 0 s; it may still not run while the gate is closed.
            if budget <= 0 or self.predictor.quantum_high(quantum) > budget or not self.lane.ready():
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
        """Count the quanta that have ended since the last look, each with its job, and pass the turn if it is over."""
        for took in self.lane.ended():
            job, quantum, busy = self._outstanding.popleft()
            self.counts.ran(quantum.kind, took)
            self.predictor.observe_quantum(quantum, took.seconds, busy)
            self.governor.ran(took.seconds, clock())
            self.observer.ended(took.seconds)
            self.jobs.ran(job, took.seconds)
        self._pass_turn()

    def _pass_turn(self) -> None:
        self.jobs.pass_turn(settled=not self._outstanding)

    def _requests_arrived(self, timeout_s: float) -> bool:
        """Wait at most `timeout_s` for a request on one of the scheduler's sockets; return whether there is one."""
        events = self.idle_poller.poll(timeout_s * 1000)
        return any(socket is not self.commands.socket for socket, _ in events)

    def _serve_commands(self) -> None:
        """Carry out and answer at most one message of the daemon's."""
        message = self.commands.receive()
        if message is None:
            return
        job, error = None, ""
        try:
            job = self.obey(message.payload)
        except UmbelError as refusal:
            error = str(refusal)
        self.commands.reply(message, self.status(job, error))
