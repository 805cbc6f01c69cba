"""Training that is cut off anywhere goes on from its checkpoint to the same bits, and one that does not fit is refused.

The seconds of these jobs are their steps, so that the clock of the machine is in no learning rate.
"""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from serving.checkpoint import CheckpointHeader, FileMark, Origin
from serving.cotrainer.checkpoints.course import Course, Kept, copy_state, read_rows
from serving.cotrainer.checkpoints.writer import CheckpointWriter, Layer, Snapshot, Writing, checksum
from serving.cotrainer.lora import Factors
from serving.cotrainer.objectives.objective import examples_in
from serving.cotrainer.progress import Progress
from serving.cotrainer.quantum import BOUNDARIES, Pieces
from serving.cotrainer.trainer import LoraTrainer
from tests.toys.serving.peft_loop import (
    CUT,
    MAX_RANK,
    ROWS,
    SEQ_LEN,
    build,
    copied,
    factors_of,
    plan,
    ragged_rows,
    reference,
)
from umbel.base.shapes import LINEARS
from umbel.errors import DataError
from umbel.messages import TrainPlan
from umbel.token_file import TokenFile

STEPS = 6
PLANS: dict[str, dict[str, Any]] = {
    "both factors, with decay": {"weight_decay": 0.1},
    "one factor, pulled to the parent": {"factors": "B", "proximal": 0.5},
    "the other factor": {"factors": "A"},
    "pairs, for more than two epochs": {"objective": "dpo", "beta": 0.5, "batch_size": 3},
    "warm-up and cosine": {"schedule": "cosine", "warmup_steps": 2, "seconds": 8.0},
}


@pytest.fixture(scope="module")
def data() -> TokenFile:
    return ragged_rows()


@pytest.fixture(scope="module")
def parent(tiny_llama: Path) -> Factors:
    return factors_of(reference(tiny_llama, trained_before=True))


@pytest.fixture(scope="module")
def engine(tiny_llama: Path) -> Callable[[], LoraTrainer]:
    """Start an engine anew. Every second one has taken a step, as in a rehearsal; in the others AdamW has no state."""
    started: list[LoraTrainer] = []

    def start() -> LoraTrainer:
        base = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        trainer = LoraTrainer(base, target_modules=LINEARS, max_rank=MAX_RANK, seq_len=SEQ_LEN, pieces=CUT)
        if len(started) % 2:
            for _ in trainer.warm_up():
                pass
        started.append(trainer)
        return trainer

    return start


@dataclass
class Round:
    """Jobs of one plan over the same data, with one checkpoint."""

    path: Path
    plan: TrainPlan
    parent: Factors
    data: TokenFile

    def kept(self, every_s: float = 1.0) -> Kept:
        mark = FileMark(path="data", bytes=len(self.data), changed_ns=0)
        origin = Origin(plan=self.plan, parent=FileMark(path="parent", bytes=1, changed_ns=0), data=mark)
        return Kept(self.path, origin, every_s, CheckpointWriter())

    def train(
        self, trainer: LoraTrainer, progress: Progress, kept: Kept | None, until: int | None = None, rows: Any = None
    ) -> Iterator[str]:
        """Run a job; yield the kind of each quantum before it runs, when what was written is on disk."""
        course = Course(self.plan, examples_in(self.plan, self.data) if rows is None else rows, until, kept)
        source = self.parent.__getitem__
        for quantum in trainer.train(self.plan, source, self.data, progress, lambda: float(progress.steps), course):
            settled(kept)
            yield quantum.kind
        course.write_last()

    def finish(self, trainer: LoraTrainer, kept: Kept | None, **burst: Any) -> tuple[Factors, Progress]:
        progress = Progress()
        for _ in self.train(trainer, progress, kept, **burst):
            pass
        return copied(trainer), progress

    def steps(self) -> int:
        return CheckpointHeader.read(self.path).steps if self.path.exists() else 0


@pytest.fixture
def training(tmp_path: Path, parent: Factors, data: TokenFile) -> Callable[..., Round]:
    return lambda **changes: Round(tmp_path / "checkpoint", plan(steps=STEPS, **changes), parent, data)


def settled(kept: Kept | None) -> None:
    while kept is not None and kept.writer.busy:
        time.sleep(1e-3)


def equal(one: Factors, other: Factors) -> bool:
    return all(torch.equal(a, b) for module in one for a, b in zip(one[module], other[module], strict=True))


def counted(progress: Progress) -> tuple[float, ...]:
    return progress.steps, progress.examples, progress.tokens, progress.loss_tokens, progress.loss_sum


@pytest.mark.parametrize("changes", PLANS.values(), ids=PLANS.keys())
def test_a_job_that_is_cut_off_after_any_quantum_goes_on_to_the_same_bits(
    training: Callable[..., Round], engine: Callable[[], LoraTrainer], changes: dict[str, Any]
) -> None:
    round_ = training(**changes)
    wanted, counts = round_.finish(engine(), None)
    left: dict[int, bytes] = {}
    progress, layers = Progress(), 2
    kinds = []
    trainer = engine()
    for kind in round_.train(trainer, progress, round_.kept()):
        kinds.append(kind)
        if round_.steps():
            assert round_.steps() in (progress.steps, progress.steps - 1), "a step is lost at most"
            left[round_.steps()] = round_.path.read_bytes()
    assert equal(copied(trainer), wanted), "checkpoints change nothing"
    assert sorted(left) == list(range(1, STEPS))
    assert kinds.count("checkpoint") == layers * (STEPS - 1)
    for steps, content in left.items():
        round_.path.write_bytes(content)
        trained, went_on = round_.finish(engine(), round_.kept())
        assert equal(trained, wanted), f"from step {steps}"
        assert counted(went_on) == counted(counts)
        assert went_on.before_s == steps


def test_between_the_layers_of_a_checkpoint_no_other_job_gets_the_buffers(
    training: Callable[..., Round], engine: Callable[[], LoraTrainer]
) -> None:
    round_, progress = training(), Progress()
    kinds = list(round_.train(engine(), progress, round_.kept()))
    first = kinds.index("checkpoint")
    assert kinds[first - 1 : first + 4] == ["step", "checkpoint", "checkpoint", "read_back", "attention"]
    assert not {"checkpoint", "restore", "read_back"} & BOUNDARIES


def test_what_was_copied_stays_as_it_is_while_training_goes_on(
    training: Callable[..., Round], engine: Callable[[], LoraTrainer]
) -> None:
    """It may be written much later."""
    round_, trainer, layers = training(), engine(), list[Layer]()
    round_.finish(trainer, None, until=1)
    for _ in copy_state(trainer.factors, layers):
        pass
    assert [layer.keys() for layer in layers] == 2 * [trainer.factors[0].kept().keys()]
    sums = [checksum(layer) for layer in layers]
    round_.finish(trainer, None, until=2)
    assert [checksum(layer) for layer in layers] == sums


@pytest.mark.parametrize("changes", PLANS.values(), ids=PLANS.keys())
def test_bursts_come_to_the_bits_of_one_run(
    training: Callable[..., Round], engine: Callable[[], LoraTrainer], changes: dict[str, Any]
) -> None:
    round_ = training(**changes)
    wanted, counts = round_.finish(engine(), None)
    for until in (2, 3, None):
        trainer = engine()
        with torch.inference_mode():  # as in SGLang's loop
            trained, progress = round_.finish(trainer, round_.kept(every_s=0.0), until=until)
        assert progress.steps == (until or STEPS)
        assert round_.steps() == (until or 3), "written at `until` only"
    assert equal(trained, wanted)
    assert counted(progress) == counted(counts)


class Slow(CheckpointWriter):
    """A disk on which nothing has arrived that a thread began to write."""

    def begin(self, path: Path, snapshot: Snapshot) -> Writing:
        return Writing(path)


@pytest.mark.parametrize("every_s", [0.0, 1.0])
def test_a_burst_whose_time_is_over_leaves_its_state_too(
    training: Callable[..., Round], engine: Callable[[], LoraTrainer], every_s: float
) -> None:
    """Also where a checkpoint of the same step is on its way already."""
    round_ = training(seconds=3.0)
    for until in (5, 6):
        progress = round_.finish(engine(), round_.kept(every_s)._replace(writer=Slow()), until=until)[1]
        assert (progress.steps, round_.steps()) == (3, 3)


def truncate(content: bytes) -> bytes:
    return content[:-1]


def empty(content: bytes) -> bytes:
    return b""


def flip_a_number(content: bytes) -> bytes:
    """In the last layer, after the first one was restored."""
    return content[:-100] + bytes([content[-100] ^ 1]) + content[-99:]


def flip_a_count(content: bytes) -> bytes:
    return content.replace(b'steps\\": 3', b'steps\\": 4').replace(b'steps\\":3', b'steps\\":4')


def junk(content: bytes) -> bytes:
    return b"junk" * 1000


@pytest.mark.parametrize("changes", [{"proximal": 0.5}, {"objective": "dpo", "batch_size": 3}], ids=["sft", "dpo"])
@pytest.mark.parametrize("harm", [truncate, empty, flip_a_number, flip_a_count, junk], ids=lambda harm: harm.__name__)
def test_a_damaged_checkpoint_is_not_used_and_training_begins_at_the_parent(
    training: Callable[..., Round],
    engine: Callable[[], LoraTrainer],
    caplog: pytest.LogCaptureFixture,
    harm: Callable[[bytes], bytes],
    changes: dict[str, Any],
) -> None:
    round_ = training(**changes)
    wanted, counts = round_.finish(engine(), None)
    round_.finish(engine(), round_.kept(), until=3)
    content = round_.path.read_bytes()
    round_.path.write_bytes(harm(content))
    assert round_.path.read_bytes() != content
    trainer = engine()
    with torch.inference_mode():  # as in SGLang's loop
        trained, progress = round_.finish(trainer, round_.kept())
    assert equal(trained, wanted)
    assert (counted(progress), progress.before_s) == (counted(counts), 0.0)
    (line,) = refusals(caplog)
    assert f"{round_.path}: damaged" in line


@pytest.mark.parametrize("other", ["plan", "parent", "data", "rank"])
def test_a_checkpoint_of_another_job_is_not_used(
    training: Callable[..., Round],
    engine: Callable[[], LoraTrainer],
    caplog: pytest.LogCaptureFixture,
    tiny_llama: Path,
    other: str,
) -> None:
    round_ = training()
    trainer = engine()
    wanted = round_.finish(trainer, None)[0]
    kept = round_.kept()
    if other == "rank":
        trainer = build(tiny_llama, target_modules=("q_proj",))
    else:
        part = plan(seed=4) if other == "plan" else FileMark(path="another", bytes=len(round_.data), changed_ns=0)
        kept = kept._replace(origin=kept.origin.model_copy(update={other: part}))
    round_.finish(trainer, kept, until=3)
    assert round_.steps() == 3
    assert equal(round_.finish(engine(), round_.kept())[0], wanted)
    (line,) = refusals(caplog)
    assert ("max_lora_rank or target_modules" if other == "rank" else "another plan, parent or data") in line


def refusals(caplog: pytest.LogCaptureFixture) -> list[str]:
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    return [line for line in warned if line.startswith("checkpoint.refused") and "begins at the parent" in line]


# Rows


class Watched(Course):
    """A course that keeps what was drawn."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.drawn: list[int] = []

    def draw(self, count: int, *may: Any) -> list[int]:
        rows = super().draw(count, *may)
        self.drawn += rows
        return rows


SOME, OTHERS = np.array([3, 5, 7, 11, 13], np.int32), np.array([0, 1, 2], np.int32)


def test_with_the_same_rows_the_order_goes_on_and_with_others_it_begins_anew(
    training: Callable[..., Round], engine: Callable[[], LoraTrainer]
) -> None:
    round_, trainer = training(), engine()

    def burst(until: int, rows: Any) -> list[int]:
        course = Watched(round_.plan, rows, until, round_.kept(every_s=0.0))
        for _ in trainer.train(round_.plan, round_.parent.__getitem__, round_.data, Progress(), None, course):
            pass
        course.write_last()
        return course.drawn

    size = round_.plan.batch_size
    whole = Watched(round_.plan, SOME).draw(4 * size)
    assert sorted(whole[:5]) == sorted(whole[5:10]) == SOME.tolist(), "epochs over this list"
    assert burst(1, SOME) + burst(3, SOME) == whole[: 3 * size]
    anew = burst(5, OTHERS)
    assert anew == Watched(round_.plan, OTHERS).draw(2 * size)
    assert set(anew) == set(OTHERS.tolist())
    assert round_.steps() == 5


BAD_ROWS: list[tuple[Any, str]] = [
    (np.array([], np.int32), "at least one; here are int32 [0]"),
    (np.array([[1]], np.int32), "here are int32 [1, 1]"),
    (np.array([1], np.int64), "here are int64 [1]"),
    (np.array([0, ROWS], np.int32), f"rows 0 to {ROWS}; test has 0 to {ROWS - 1}"),
    (np.array([-1], np.int32), "rows -1 to -1"),
    (np.array(["a"], object), "no row numbers"),
]


@pytest.mark.parametrize(("rows", "reason"), BAD_ROWS)
def test_row_numbers_that_cannot_be_drawn_from_are_refused(
    tmp_path: Path, data: TokenFile, rows: Any, reason: str
) -> None:
    np.save(tmp_path / "rows.npy", rows)
    with pytest.raises(DataError) as raised:
        read_rows(tmp_path / "rows.npy", data, ROWS)
    assert reason in str(raised.value)


# Sizes of pieces


@pytest.mark.parametrize("recompute", [False, True])
def test_computing_activations_again_changes_no_bit_and_other_sizes_only_roundings(
    training: Callable[..., Round], engine: Callable[[], LoraTrainer], recompute: bool
) -> None:
    """Why bits are promised for pieces of the same sizes only."""
    round_, trainer = training(), engine()
    wanted = round_.finish(trainer, None)[0]
    cut = vars(CUT) | {"recompute": recompute}
    trainer.pieces = Pieces(**cut)
    assert equal(round_.finish(trainer, None)[0], wanted)
    trainer.pieces = Pieces(**cut | {"mlp_tokens": 2 * CUT.mlp_tokens})
    other = round_.finish(trainer, None)[0]
    assert all(torch.allclose(a, b, atol=1e-4) for m in wanted for a, b in zip(wanted[m], other[m], strict=True))
