"""`JobsInTurns`: keeps the daemon's jobs by their ids, and lets one at a time have the trainer."""

from serving.cotrainer.checkpoints.writer import CheckpointWriter
from serving.cotrainer.jobs.job import Job
from serving.cotrainer.jobs.swap import Swap
from serving.cotrainer.jobs.turns import Turns
from serving.cotrainer.quantum import Quantum
from serving.cotrainer.trainer import LoraTrainer
from serving.trainer_socket import EvaluateJob, TrainJob
from umbel.errors import TrainingError
from umbel.messages import JobState

MOST_OPEN = 64
"""Jobs that may be open at a time; a site has one per adapter, and its evaluations."""
KEPT = 64
"""Jobs that have ended and are remembered, the latest: whoever gave them asks how they ended."""


class JobsInTurns:
    """Starts, cancels and finds jobs, and says what runs next: a quantum of the job that has the turn, or of a swap.

    The turn changes only in `pass_turn`, which is called after whatever may be a reason for it.
    """

    def __init__(self) -> None:
        self.holder: Job | None = None
        """The job that has the turn, or had it last, whether it still runs or has ended."""
        self.handed_over = 0
        """Times that another job got the turn."""
        self._turns = Turns()
        self._jobs: dict[str, Job] = {}
        self._in_buffers: Job | None = None
        """The job that the trainer's buffers are of."""
        self._swap: Swap | None = None
        self._swap_s = 0.0
        """Seconds of the present swap, or of the last one."""
        self._trainer: LoraTrainer | None = None
        self._writer = CheckpointWriter()

    def find(self, job: str) -> Job | None:
        """Return a job by its id; None for one that never came, or ended long ago."""
        return self._jobs.get(job)

    @property
    def known(self) -> list[Job]:
        """Return all jobs that are remembered, the oldest first."""
        return list(self._jobs.values())

    @property
    def open(self) -> dict[str, float]:
        """Return for each job with quanta to run the seconds of those that ran."""
        return {job.id: job.progress.busy_s for job in self._jobs.values() if job.open}

    @property
    def parked_bytes(self) -> int:
        """Return the memory in which jobs wait for their next turn."""
        return sum(layer.bytes for job in self._jobs.values() for layer in job.parked)

    @property
    def runnable(self) -> Job | None:
        """Return the job that has the turn; None where no job has quanta to run."""
        return self.holder if self.holder is not None and self.holder.open else None

    @property
    def next(self) -> Quantum | None:
        """Return the quantum that `advance` will run; None where there is none, or only of what has run already."""
        if self.runnable is None:
            return None
        return self._swap.next if self._swap is not None else self.runnable.next

    def start(self, order: TrainJob | EvaluateJob, trainer: LoraTrainer) -> Job:
        """Add a job, which may have to wait for its first turn. Raises TrainingError where too many are open."""
        if len(self.open) >= MOST_OPEN:
            raise TrainingError(f"{MOST_OPEN} jobs are open here already; wait until one has ended, or cancel one")
        ended = [job.id for job in self._jobs.values() if job.state.final and job is not self.holder]
        for name in ended[: max(0, len(ended) - KEPT + 1)]:
            del self._jobs[name]
        job = self._jobs[order.id] = Job(order, trainer, self._writer)
        self._turns.join(job.id, job.share)
        self._trainer = trainer
        return job

    def advance(self) -> Job | None:
        """Run the announced quantum; return its job, None for one of a swap. Only where `next` is not None.

        Raises UmbelError if the job cannot go on, for want of memory, too.
        """
        if self._swap is None:
            job = self._in_buffers = self.holder
            assert job is not None
            job.advance()
            return job
        self._swap.advance()
        if self._swap.next is None:
            self._in_buffers, self._swap = self._swap.resumed, None
            self._prepare()  # the turn may have gone on meanwhile
        return None

    def ran(self, job: Job | None, seconds: float) -> None:
        """Count a quantum that has ended, with its job (None: a swap's), which ends with its last one."""
        if job is None:
            self._swap_s += seconds
            self._turns.swapped(self._swap_s)
            return
        job.progress.busy_s += seconds
        self._turns.ran(job.id, seconds)
        if job.next is None and job.open:
            job.end()

    def pass_turn(self, settled: bool) -> None:
        """Give the turn to whoever is due, if the holder has ended or another may have the buffers now.

        `settled`: every quantum that was launched is counted; before that, a job that goes on keeps its turn.
        """
        if self.runnable is not None and not (settled and self.runnable.interruptible):
            return
        for name in self._turns.jobs:
            if not self._jobs[name].open:
                self._turns.leave(name)
        chosen = self._turns.choose()
        if chosen is None:
            return
        if self._jobs[chosen] is not self.holder:
            self.holder = self._jobs[chosen]
            self.handed_over += 1
        self._prepare()

    def fail(self, reason: str) -> None:
        """End the job that has the turn; in the middle of a swap both of its jobs, whose state is in pieces."""
        ended = [self.holder, *([self._swap.leaves, self._swap.comes] if self._swap is not None else [])]
        for job in ended:
            if job is not None:
                job.finish(JobState.FAILED, reason)
        self._swap = self._in_buffers = None

    def _prepare(self) -> None:
        """Put a swap before the next quantum of the holder, if there is anything to put aside or back."""
        holder, before = self.runnable, self._in_buffers
        if self._swap is not None or holder is None or holder is before:
            return
        leaves = before if before is not None and before.open else None
        if leaves is not None or holder.parked:
            assert self._trainer is not None
            self._swap, self._swap_s = Swap(self._trainer.factors, leaves, holder), 0.0
