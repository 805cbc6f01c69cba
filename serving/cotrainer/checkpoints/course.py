"""`Course`: the examples of a training job in their order, the step at which it ends, and its checkpoint.

A checkpoint has all that the next step depends on: factors and AdamW's moments, the counts, the seconds so far, and the
place in the order of the examples; FedProx's parent is read again, and no other random number is drawn. So what goes on
from one is, to the bit, what would have come without the break, if the steps are cut into pieces of the same sizes: in
others sums are rounded otherwise. An engine without users always takes the same sizes; users change them, with a break
or without.
"""

import hashlib
import logging
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors

from serving.checkpoint import CheckpointHeader, FileMark, Origin
from serving.cotrainer.checkpoints.writer import CheckpointWriter, Layer, Snapshot, Writing, checksum
from serving.cotrainer.lanes.readback import Readback
from serving.cotrainer.lora import LayerFactors
from serving.cotrainer.microbatch import epochs
from serving.cotrainer.objectives.objective import examples_in
from serving.cotrainer.progress import Progress
from serving.cotrainer.quantum import Quanta, Quantum
from serving.trainer_socket import TrainJob
from umbel.errors import DataError
from umbel.messages import TrainPlan
from umbel.token_file import Ints, TokenFile

logger = logging.getLogger(__name__)


class Kept(NamedTuple):
    """Where a job's checkpoint is, what it is of, and how often it is written."""

    path: Path
    origin: Origin
    every_s: float
    """Seconds of the job between two; 0: none is written but the one at `until`."""
    writer: CheckpointWriter


class Course:
    """The way of one job through its data.

    >>> course = Course(plan, examples_in(plan, data))      # all of them, all steps, no checkpoint
    >>> course = Course.of(job, data, writer)               # as a TrainJob says
    """

    def __init__(
        self, plan: TrainPlan, examples: int | Ints, until: int | None = None, kept: Kept | None = None
    ) -> None:
        """Draw from so many examples, or from those with the numbers `examples` [N].

        It ends at step `until` (None: the plan's). An example is a row of the token file, or a pair of rows.
        """
        self.steps = plan.steps if until is None else min(until, plan.steps)
        """Optimizer steps at which it ends, those of before a break included."""
        self._plan, self._until, self._kept = plan, until, kept
        self._listed = None if isinstance(examples, int) else examples
        self._examples = examples if isinstance(examples, int) else len(examples)
        self._digest = "" if self._listed is None else hashlib.sha256(self._listed.tobytes()).hexdigest()
        self._go_to(0)
        self._saved_s, self._saved_steps, self._resumed = 0.0, 0, 0
        """Seconds and steps at the last checkpoint, which may not be on disk yet; steps from which the job went on."""
        self._writing: Writing | None = None
        self._last: Snapshot | None = None
        self._looked = False
        self._found: tuple[CheckpointHeader, Any] | None = None
        """The checkpoint to go on from, once it was looked at."""

    @classmethod
    def of(cls, job: TrainJob, data: TokenFile, writer: CheckpointWriter) -> "Course":
        """Read what a job names. Raises DataError for numbers of examples that `data` does not have."""
        examples: int | Ints = examples_in(job.plan, data)
        if job.rows is not None:
            examples = read_rows(Path(job.rows), data, examples_in(job.plan, data))
        if job.checkpoint is None:
            return cls(job.plan, examples, job.until)
        origin = Origin(plan=job.plan, parent=FileMark.of(job.parent), data=FileMark.of(job.data))
        return cls(job.plan, examples, job.until, Kept(Path(job.checkpoint), origin, job.checkpoint_s, writer))

    def draw(self, count: int, may: Callable[[int], bool] = lambda example: True) -> list[int]:
        """Return the numbers of the next examples, without those that may not be drawn."""
        drawn: list[int] = []
        while len(drawn) < count:
            self._drawn += 1
            example = self._number(next(self._order))
            drawn += [example] if may(example) else []
        return drawn

    def ahead(self, layers: Sequence[LayerFactors]) -> list[int]:
        """Return the numbers of the examples that `draw` will return up to the end, each once.

        Where there is a checkpoint, they are those behind it.
        """
        header = found[0] if (found := self._open(layers)) is not None else None
        steps, drawn = (header.steps, self._place(header)) if header is not None else (0, 0)
        draws = min((self.steps - steps) * self._plan.batch_size, 2 * self._examples)  # in two epochs each comes up
        return list(dict.fromkeys(map(self._number, islice(epochs(self._examples, self._plan.seed, drawn), draws))))

    def resume(self, layers: Sequence[LayerFactors], progress: Progress) -> Generator[Quantum, None, bool]:
        """Go on from the checkpoint, if there is one of this job, a layer per quantum.

        Return False if it turns out to be damaged: then some layers are not what they were.
        """
        found = self._open(layers)
        if found is None:
            return True
        header, file = found
        for number, (factors, crc) in enumerate(zip(layers, header.crc32, strict=True)):
            yield Quantum("restore")
            names = [name for name in file.keys() if name.partition(".")[0] == str(number)]  # noqa: SIM118
            kept = {name.partition(".")[2]: file.get_tensor(name) for name in names}
            if checksum({name: tensor.numpy() for name, tensor in kept.items()}) != crc:
                self._refused("damaged")
                self._found = None
                return False
            factors.restore(kept)
        progress.go_on_from(header.progress)
        self._saved_s, self._saved_steps, self._resumed = progress.before_s, progress.steps, progress.steps
        self._go_to(self._place(header))
        self._found = None
        logger.info("training goes on at step %d, from %s", progress.steps, file_of(self._kept))
        return True

    def save_if_due(self, layers: Sequence[LayerFactors], progress: Progress, seconds: float) -> Quanta:
        """Have a checkpoint written if it is time for one and none is being written. Only between two steps."""
        kept = self._kept
        if kept is None or not kept.every_s or kept.writer.busy or progress.steps == self._saved_steps:
            return
        if seconds - self._saved_s < kept.every_s:
            return
        snapshot = yield from self._copy(kept, layers, progress, seconds)
        self._writing = kept.writer.begin(kept.path, snapshot)

    def save_last(self, layers: Sequence[LayerFactors], progress: Progress, seconds: float) -> Quanta:
        """Copy the state for `write_last`, if another job is to go on behind this one."""
        if self._kept is not None and self._until is not None and progress.steps != self._resumed:
            self.close()
            self._last = yield from self._copy(self._kept, layers, progress, seconds)

    def write_last(self) -> None:
        """Write what `save_last` copied; it is on disk on return. Not on the scheduler's thread. Raises OSError."""
        if self._kept is not None and self._last is not None:
            last, self._last = self._last, None
            self._kept.writer.write(self._kept.path, last)

    def close(self) -> None:
        """Let no checkpoint appear any more that is not yet on disk."""
        if self._writing is not None:
            self._writing.stop()

    def _go_to(self, drawn: int) -> None:
        self._drawn = drawn
        self._order = epochs(self._examples, self._plan.seed, drawn)

    def _place(self, header: CheckpointHeader) -> int:
        """Return the place in the order behind a checkpoint: with other examples it is the beginning."""
        return header.drawn if header.rows == self._digest else 0

    def _number(self, place: int) -> int:
        return place if self._listed is None else int(self._listed[place])

    def _open(self, layers: Sequence[LayerFactors]) -> tuple[CheckpointHeader, Any] | None:
        if not self._looked:
            self._looked, self._found = True, self._look(layers)
        return self._found

    def _look(self, layers: Sequence[LayerFactors]) -> tuple[CheckpointHeader, Any] | None:
        if self._kept is None or not self._kept.path.exists():
            return None
        try:
            header = CheckpointHeader.read(self._kept.path)
        except DataError as error:
            self._refused(str(error))
            return None
        if header.origin != self._kept.origin:
            self._refused("it is of another plan, parent or data")
            return None
        file: Any = safetensors.safe_open(self._kept.path, framework="pt")
        named = {f"{at}.{name}": kept for at, layer in enumerate(layers) for name, kept in layer.kept().items()}
        shapes = {name: list(kept.shape) for name, kept in named.items() if name.count(".") == 1}  # of the factors
        if shapes != {name: file.get_slice(name).get_shape() for name in file.keys() if name.count(".") == 1}:  # noqa: SIM118
            self._refused("it was written with another [engine].max_lora_rank or target_modules")
            return None
        return header, file

    def _refused(self, why: str) -> None:
        logger.warning("checkpoint.refused %s: %s; training begins at the parent", file_of(self._kept), why)

    def _copy(
        self, kept: Kept, layers: Sequence[LayerFactors], progress: Progress, seconds: float
    ) -> Generator[Quantum, None, Snapshot]:
        header = CheckpointHeader(
            origin=kept.origin, rows=self._digest, drawn=self._drawn,
            progress=asdict(progress) | {"before_s": seconds},
        )  # fmt: skip
        self._saved_s, self._saved_steps = seconds, progress.steps
        copied: list[Layer] = []
        yield from copy_state(layers, copied)
        return Snapshot(header, copied)


def copy_state(layers: Sequence[LayerFactors], into: list[Layer]) -> Quanta:
    """Copy all that the next step depends on, but FedProx's parent, to the host, a layer per quantum."""
    started: dict[str, Readback] = {}
    for factors in layers:
        yield Quantum("checkpoint")
        if started:
            into.append({name: copy.read().numpy() for name, copy in started.items()})
        started = {name: Readback(tensor, own=True) for name, tensor in factors.kept().items()}
    yield Quantum("read_back")
    into.append({name: copy.read().numpy() for name, copy in started.items()})


def read_rows(path: Path, data: TokenFile, examples: int) -> Ints:
    """Read the numbers [N] of those of `data`'s examples that are drawn from; raise DataError for any other file."""
    try:
        rows: Ints = np.load(path, allow_pickle=False)
    except Exception as error:  # numpy parses the header as Python, and lets any error of that parser through
        raise DataError(f"{path}: no row numbers ({error}); write a one-dimensional array of int32") from error
    if rows.dtype != np.int32 or rows.ndim != 1 or not len(rows):
        raise DataError(
            f"{path}: row numbers are one dimension of int32, at least one; here are {rows.dtype} {list(rows.shape)}"
        )
    if rows.min() < 0 or rows.max() >= examples:
        raise DataError(f"{path}: rows {rows.min()} to {rows.max()}; {data.path} has 0 to {examples - 1}")
    return rows


def file_of(kept: Kept | None) -> str:
    """Return the name of a checkpoint for the log."""
    return str(kept.path) if kept is not None else ""
