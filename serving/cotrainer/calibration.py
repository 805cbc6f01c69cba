"""How large pieces of training may be: each kind of quantum timed on a ladder of sizes, and the choice that follows.

Calibration runs before the engine is ready, so its largest micro-batch also brings the memory that training will need.
A size that does not fit into memory is a data point, as in SLO-Guard: the rung above which nothing is tried.
"""

import hashlib
import importlib.metadata
import json
import logging
import platform
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from serving.cotrainer.lane import CpuLane, Lane
from serving.cotrainer.memory import PeakBytes
from serving.cotrainer.quantum import Pieces, Quanta, Quantum
from serving.cotrainer.trainer import LoraTrainer
from umbel.base import read_config
from umbel.errors import TrainingError
from umbel.peft_dir import replace_durably

PIECES = 1
"""Raised whenever what a quantum computes changes, so that what was timed before is timed again."""
SMALLEST = 16
"""Tokens of the smallest size that is timed; below it, a piece is all overhead."""
REPEATS = 3
"""Of each kind and size, after one that is not timed; the longest of so few stands for their P99."""

logger = logging.getLogger(__name__)


class Calibration(BaseModel):
    """Latency and memory of a trainer's quanta, on one machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    seconds: dict[str, dict[int, float]]
    """Kind → tokens → P99."""
    peak_bytes: dict[int, int]
    """Rows of a micro-batch that fit → the most memory that training takes with them, factors and moments included."""
    recompute: bool = False
    """Whether activations of not even one row can be kept, so that everything here was measured without them."""

    @classmethod
    def load(cls, path: Path, key: str) -> "Calibration | None":
        """What was saved with the same key; None where there is nothing of use."""
        try:
            found = cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):  # the first start, another release, a damaged file: it is measured again
            return None
        return found if found.key == key else None

    def save(self, path: Path) -> None:
        replace_durably(path, self.model_dump_json(indent=2).encode())


def key(model_path: str, trainer: LoraTrainer) -> str:
    """What the speed of a trainer's quanta depends on: hardware, threads, model, adapter, releases."""
    device = trainer.device
    parts: dict[str, Any] = {
        "pieces": PIECES,
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "dtype": str(trainer.model.dtype),
        "model": read_config(Path(model_path)),
        "factors": trainer.state_bytes,
        "micro_batch": trainer.pieces.micro_batch,
        "seq_len": trainer.seq_len,
        "releases": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "sglang")},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def calibrate(
    trainer: LoraTrainer, rows: Sequence[int], *, budget_s: float, max_bytes: int | None, lane: Lane | None = None
) -> Calibration:
    """Time each kind of quantum on `lane`, from `SMALLEST` tokens of one row up to micro-batches of `rows`.

    A rung for which memory or `budget_s` does not suffice is left out, with all above it. The smallest micro-batch is
    run in any case; raises TrainingError where it does not fit even without keeping activations. Leaves the trainer
    with the largest pieces that do, its factors zero. The caller knows the `key`.
    """
    lane = lane or CpuLane(time.thread_time)  # whoever else has the core now is no part of a quantum
    for recompute in (False, True):
        found = _climb(trainer, sorted(rows), recompute, budget_s, max_bytes, lane)
        if found.peak_bytes:
            whole = Pieces.whole(max(found.peak_bytes), trainer.seq_len)
            trainer.pieces = replace(whole, recompute=recompute)
            _time_the_rest(trainer, lane, found.seconds)
            return found
    limit = "the memory there is" if max_bytes is None else f"[training].memory_mb = {max_bytes >> 20}"
    raise TrainingError(
        f"training on {min(rows)} rows of {trainer.seq_len} tokens does not fit into {limit}, even without keeping "
        "activations; raise it, or lower [training].seq_len"
    )


def choose(calibration: Calibration, seq_len: int, longest_s: float, max_bytes: int | None) -> Pieces:
    """The largest pieces of which each takes at most `longest_s` by its P99, the smallest where none does.

    `longest` says how long those take.
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


def longest(calibration: Calibration, pieces: Pieces, seq_len: int) -> float:
    """P99 in seconds of the longest quantum that these pieces bring."""
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
    """Tokens of the largest timed size of which neither forward nor backward takes longer; the smallest if all do."""
    forward = calibration.seconds[kind]
    backward = calibration.seconds.get(f"{kind}_backward", {})
    fitting = [tokens for tokens, s in forward.items() if max(s, backward.get(tokens, 0.0)) <= longest_s]
    return max(fitting, default=min(forward))


def _climb(
    trainer: LoraTrainer, rows: list[int], recompute: bool, budget_s: float, max_bytes: int | None, lane: Lane
) -> Calibration:
    """Measure whole micro-batches, the smallest first, then parts of a row, the largest first."""
    seconds: dict[str, dict[int, float]] = {}
    peak_bytes: dict[int, int] = {}
    until = time.perf_counter() + budget_s
    expected_s, expected_bytes = 0.0, 0.0
    for at, batch in enumerate(rows):
        if peak_bytes and time.perf_counter() + expected_s > until - budget_s / 3:
            break  # the last third is for the parts of a row
        if max_bytes is not None and expected_bytes > max_bytes:
            break  # what is tried and does not fit may end the engine
        began = time.perf_counter()
        trainer.pieces = replace(Pieces.whole(batch, trainer.seq_len), recompute=recompute)
        peak = _measure(trainer, batch, trainer.seq_len, lane, seconds, until)
        if peak is None or (max_bytes is not None and peak > max_bytes):
            break
        peak_bytes[batch] = peak
        growth = rows[at + 1] / batch if at + 1 < len(rows) else 1.0
        expected_s = (time.perf_counter() - began) * growth
        expected_bytes = trainer.state_bytes + (peak - trainer.state_bytes) * growth
    for tokens in _parts_of_row(trainer.seq_len) if peak_bytes else ():
        if time.perf_counter() > until:
            break
        trainer.pieces = replace(Pieces.whole(1, tokens), recompute=recompute)
        _measure(trainer, 1, tokens, lane, seconds, until)
    return Calibration(key="", seconds=seconds, peak_bytes=peak_bytes, recompute=recompute)


def _parts_of_row(seq_len: int) -> list[int]:
    """Powers of two below a whole row, falling."""
    sizes = [1 << power for power in range(seq_len.bit_length() + 1)]
    return [size for size in reversed(sizes) if SMALLEST <= size < seq_len]


def _measure(
    trainer: LoraTrainer, rows: int, tokens: int, lane: Lane, seconds: dict[str, dict[int, float]], until: float
) -> int | None:
    """Add the longest quanta of such a micro-batch to `seconds`; return what training takes at its peak, in bytes.

    None, and nothing added, where memory does not suffice.
    """
    try:
        with PeakBytes(trainer.model) as peak:
            for _ in _timed(trainer.rehearse(rows, tokens), lane):
                pass
    except RuntimeError as error:
        # torch.OutOfMemoryError on CUDA; torch's allocator for CPUs has no error of its own.
        if not isinstance(error, torch.OutOfMemoryError) and "not enough memory" not in str(error):
            raise
        logger.info("calibration: %d rows of %d tokens do not fit into memory: %s", rows, tokens, error)
        return None
    for repeat in range(REPEATS):
        if repeat and time.perf_counter() > until:
            break
        _keep_longest(trainer.rehearse(rows, tokens), lane, seconds)
    return trainer.state_bytes + peak.bytes


def _time_the_rest(trainer: LoraTrainer, lane: Lane, seconds: dict[str, dict[int, float]]) -> None:
    """Add the quanta that no training step has; those of an evaluation are a training step's without their graph."""
    for quanta in (trainer.copy_out(1, {}, trainer.model.dtype), trainer.load(None)):
        _keep_longest(quanta, lane, seconds)
    for kind in ("attention", "mlp", "head"):
        seconds[f"evaluate_{kind}"] = dict(seconds[kind])


def _keep_longest(quanta: Quanta, lane: Lane, seconds: dict[str, dict[int, float]]) -> None:
    for quantum, took in _timed(quanta, lane):
        sizes = seconds.setdefault(quantum.kind, {})
        sizes[quantum.tokens] = max(sizes.get(quantum.tokens, 0.0), took)


def _timed(quanta: Quanta, lane: Lane) -> Iterator[tuple[Quantum, float]]:
    """Run them all on the lane; each with the seconds it took."""
    launched: deque[Quantum] = deque()
    announced = lane.run(lambda: next(quanta, None))
    _drain(lane, 1)  # the first `next` only announces
    while announced is not None:
        launched.append(announced)
        announced = lane.run(lambda: next(quanta, None))
        for took in _drain(lane, len(launched)) if announced is None or not lane.ready() else lane.elapsed():
            yield launched.popleft(), took


def _drain(lane: Lane, outstanding: int) -> list[float]:
    """Wait, before the engine serves, until what was launched has ended."""
    ended: list[float] = []
    while len(ended) < outstanding:
        ended += lane.elapsed()
    return ended


def _processor() -> str:
    """Its model name (Linux), else what the platform says."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
