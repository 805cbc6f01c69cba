"""`Calibration`: the measured time and memory of quanta, and the largest pieces that stay within a limit of both.

Words: a *rung* is one size of micro-batch (rows × tokens, with or without recomputing activations) and its memory; the
*ladder* is the list of rungs, climbed from the smallest; to *rehearse* a rung is to take one optimizer step of that
size on made-up tokens (`LoraTrainer.rehearse`). A rung that does not fit into memory is a result, as in SLO-Guard:
nothing above it is tried. Calibration runs before the engine is ready, and so the rehearsals also allocate the memory
that training will need: on a GPU at every size that can occur.
"""

import hashlib
import importlib.metadata
import json
import logging
import math
import platform
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from serving.cotrainer.checkpoints.course import copy_state
from serving.cotrainer.jobs.swap import rehearse_swap
from serving.cotrainer.lanes.lane import CpuLane, Lane
from serving.cotrainer.memory import PeakBytes, out_of_memory
from serving.cotrainer.quantum import Pieces, Quanta, Quantum
from serving.cotrainer.trainer import LoraTrainer
from umbel.base.packed import METHOD, packing_of
from umbel.base.shapes import read_config
from umbel.errors import TrainingError
from umbel.peft_dir import replace_durably

PIECES = 3
"""Version of the quanta. Raise it when the work of one changes, so that every machine measures anew."""
SMALLEST = 16
"""Tokens of the smallest size that is timed; a smaller piece is all overhead."""
REPEATS = 3
"""Timed runs of each rung, after one that is not timed; the longest of so few stands for the P99."""

logger = logging.getLogger(__name__)


class Calibration(BaseModel):
    """Latency and memory of a trainer's quanta, on one machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    """`calibration_key` of the conditions under which it was measured."""
    seconds: dict[str, dict[int, float]]
    """Kind → tokens → P99 in seconds."""
    peak_bytes: dict[int, int]
    """Rows of each micro-batch that fits → peak memory of training with it: LoRA factors, moments, what is parked."""
    recompute: bool = False
    """True if the activations of not even one row fit, so that all of this was measured with recomputing them."""

    @classmethod
    def load(cls, path: Path, key: str) -> "Calibration | None":
        """Read a saved calibration; None if there is none, or it has another key."""
        try:
            found = cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):  # the first start, another release, a damaged file: it is measured again
            return None
        return found if found.key == key else None

    def save(self, path: Path) -> None:
        """Write it durably, in place of an earlier one."""
        replace_durably(path, self.model_dump_json(indent=2).encode())


def calibration_key(model_path: str, trainer: LoraTrainer, max_bytes: int | None) -> str:
    """Return a digest of all that a calibration depends on: hardware, threads, model, sizes, memory, releases."""
    device, base = trainer.device, read_config(Path(model_path))
    named = ["torch", "transformers", "peft", "sglang", *([METHOD] if packing_of(base) else [])]
    parts: dict[str, Any] = {
        "pieces": PIECES,
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "dtype": str(trainer.model.dtype),
        "model": base,
        "factors": trainer.state_bytes,
        "parked": trainer.parked_bytes,
        "micro_batch": trainer.pieces.micro_batch,
        "seq_len": trainer.seq_len,
        "memory": max_bytes,
        "releases": {name: importlib.metadata.version(name) for name in named},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def calibrate(
    trainer: LoraTrainer, rows: Sequence[int], *, budget_s: float, max_bytes: int | None, lane: Lane | None = None
) -> Calibration:
    """Time each kind of quantum on `lane`, from `SMALLEST` tokens of one row up to micro-batches of `rows`.

    Without a lane it is a CPU's. A rung for which memory or `budget_s` does not suffice is left out, with all above it;
    the smallest micro-batch is run in any case. Leaves the trainer with the largest pieces that fit, its factors zero.
    The result's `key` is empty; the caller fills it in.

    Raises TrainingError if the smallest micro-batch does not fit even with recomputing activations.
    """
    # On a CPU other processes, such as the rest of a starting engine, may have the core: that time does not count.
    clock = time.thread_time if lane is None else time.perf_counter
    lane = lane or CpuLane(clock)
    for recompute in (False, True):
        found = _climb(trainer, sorted(rows), recompute, _Budget(budget_s, clock), max_bytes, lane)
        if found.peak_bytes:
            whole = Pieces.whole(max(found.peak_bytes), trainer.seq_len)
            trainer.pieces = replace(whole, recompute=recompute)
            if trainer.lengths:
                deque(timed(trainer.warm_up(), lane), maxlen=0)
            _time_the_rest(trainer, lane, found.seconds)
            return found
    trainer.pieces = replace(Pieces.whole(min(rows), trainer.seq_len), recompute=True)
    needed = trainer.expected_bytes(min(rows))
    kept = "" if max_bytes is None else f", and {max_bytes >> 20} MB are kept for it"
    raise TrainingError(
        f"training on {min(rows)} rows of {trainer.seq_len} tokens needs {-(-needed >> 20)} MB even without keeping "
        f"activations{kept}; set [training].memory_mb, or lower [training].seq_len or [engine].max_lora_rank"
    )


def choose_pieces(calibration: Calibration, seq_len: int, longest_s: float, max_bytes: int | None) -> Pieces:
    """Return the largest pieces of which each takes at most `longest_s` by its P99, in a micro-batch of `max_bytes`.

    Where none is fast enough, the smallest are returned; `longest_quantum` says how long those take.
    """
    fitting = [rows for rows, peak in calibration.peak_bytes.items() if max_bytes is None or peak <= max_bytes]
    micro_batch = max(fitting, default=min(calibration.peak_bytes))
    pieces = Pieces(
        micro_batch=micro_batch,
        attention_rows=max(1, _largest(calibration, "attention", longest_s) // seq_len),
        mlp_tokens=_largest(calibration, "mlp", longest_s),
        head_tokens=_largest(calibration, "head", longest_s),
        recompute=calibration.recompute,
    )
    return replace(pieces, attention_rows=min(pieces.attention_rows, micro_batch))


def longest_quantum(calibration: Calibration, pieces: Pieces, seq_len: int) -> float:
    """Return the P99 in seconds of the longest quantum that a step in these pieces has."""
    sizes = {
        "attention": pieces.attention_rows * seq_len, "mlp": pieces.mlp_tokens, "head": pieces.head_tokens,
    }  # fmt: skip
    whole = pieces.micro_batch * seq_len
    found = [0.0]
    for kind, timed in calibration.seconds.items():
        size = min(sizes.get(kind.removesuffix("_backward").removeprefix("evaluate_"), whole), whole)
        found.append(timed[min(timed, key=lambda tokens: abs(tokens - size))])
    return max(found)


def _largest(calibration: Calibration, kind: str, longest_s: float) -> int:
    """Return the largest size in tokens whose forward and backward each take at most `longest_s`, else the smallest."""
    forward = calibration.seconds[kind]
    backward = calibration.seconds.get(f"{kind}_backward", {})
    fitting = [tokens for tokens, s in forward.items() if max(s, backward.get(tokens, 0.0)) <= longest_s]
    return max(fitting, default=min(forward))


class _Budget:
    """The time that a calibration may take, on its clock, in seconds."""

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self.seconds = seconds
        self._clock, self._began = clock, clock()

    def left(self) -> float:
        return self.seconds - (self._clock() - self._began)


def _climb(
    trainer: LoraTrainer, rows: list[int], recompute: bool, budget: _Budget, max_bytes: int | None, lane: Lane
) -> Calibration:
    """Measure whole micro-batches, the smallest first, then parts of a row, the largest first.

    The result has no `peak_bytes` if not even the smallest micro-batch fits.
    """
    seconds: dict[str, dict[int, float]] = {}
    peak_bytes: dict[int, int] = {}
    expected_s = 0.0
    for at, batch in enumerate(rows):
        if peak_bytes and budget.left() < expected_s + budget.seconds / 3:
            break  # the last third is for the parts of a row
        left = budget.left()
        trainer.pieces = replace(Pieces.whole(batch, trainer.seq_len), recompute=recompute)
        if max_bytes is not None and trainer.expected_bytes(batch) > max_bytes:
            break
        peak = _measure(trainer, batch, trainer.seq_len, lane, seconds, budget)
        if peak is None or (max_bytes is not None and peak > max_bytes):
            break
        peak_bytes[batch] = peak
        growth = rows[at + 1] / batch if at + 1 < len(rows) else 1.0
        expected_s = (left - budget.left()) * growth
    for tokens in _parts_of_row(trainer.seq_len) if peak_bytes else ():
        if budget.left() < 0:
            break
        trainer.pieces = replace(Pieces.whole(1, tokens), recompute=recompute)
        _measure(trainer, 1, tokens, lane, seconds, budget)
    return Calibration(key="", seconds=seconds, peak_bytes=peak_bytes, recompute=recompute)


def _parts_of_row(seq_len: int) -> list[int]:
    """Return the powers of two below a whole row, the largest first."""
    sizes = [1 << power for power in range(seq_len.bit_length() + 1)]
    return [size for size in reversed(sizes) if SMALLEST <= size < seq_len]


def _measure(
    trainer: LoraTrainer, rows: int, tokens: int, lane: Lane, seconds: dict[str, dict[int, float]], budget: _Budget
) -> int | None:
    """Add the longest quanta of a rung to `seconds`; return the peak memory of training with it, in bytes.

    Returns None, and adds nothing, if memory does not suffice.
    """
    try:
        peak_bytes = _peak_bytes(trainer, rows, tokens, lane)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        logger.info("calibration: %d rows of %d tokens do not fit into memory: %s", rows, tokens, error)
        return None
    for repeat in range(REPEATS):
        if repeat and budget.left() < 0:
            break
        _keep_longest(trainer.rehearse(rows, tokens), lane, seconds)
    return peak_bytes


def _peak_bytes(trainer: LoraTrainer, rows: int, tokens: int, lane: Lane) -> int:
    """Take a step; return the peak of its memory in bytes. On a CPU nothing counts it, and it is what was expected."""
    quanta = timed(trainer.rehearse(rows, tokens), lane)
    if trainer.device.type == "cuda":
        with PeakBytes(trainer.device) as peak:
            deque(quanta, maxlen=0)
        return trainer.state_bytes + trainer.parked_bytes + peak.bytes
    deque(quanta, maxlen=0)
    return trainer.expected_bytes(rows)


def _time_the_rest(trainer: LoraTrainer, lane: Lane, seconds: dict[str, dict[int, float]]) -> None:
    """Add the quanta that no training step has; those of an evaluation take at most as long as in a training step."""
    for quanta in (
        rehearse_swap(trainer.factors), copy_state(trainer.factors, []), trainer.copy_out(1, {}), trainer.load(None),
    ):  # fmt: skip
        _keep_longest(quanta, lane, seconds)
    for kind in ("attention", "mlp", "head"):
        seconds[f"evaluate_{kind}"] = dict(seconds[kind])


def _keep_longest(quanta: Quanta, lane: Lane, seconds: dict[str, dict[int, float]]) -> None:
    """Run all quanta, and raise the times in `seconds` to the longest of each kind and size."""
    for quantum, took in timed(quanta, lane):
        sizes = seconds.setdefault(quantum.kind, {})
        sizes[quantum.tokens] = max(sizes.get(quantum.tokens, 0.0), took)


def timed(quanta: Quanta, lane: Lane) -> Iterator[tuple[Quantum, float]]:
    """Run all quanta on the lane, and wait for each; yield each with its seconds. Only before the engine serves."""
    announced = lane.run(lambda: next(quanta, None))  # it only announces, but its memory is the lane's, too
    lane.wait(math.inf)
    lane.ended()
    while announced is not None:
        quantum, announced = announced, lane.run(lambda: next(quanta, None))
        lane.wait(math.inf)
        for took in lane.ended():
            yield quantum, took.seconds


def _processor() -> str:
    """Return the processor's model name (Linux), or the one that Python's `platform` knows."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
