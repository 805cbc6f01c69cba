"""Memory that does not suffice costs the rung, then the job; what was computed before and after is right."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from serving.cotrainer.memory import SCARCE
from serving.cotrainer.microbatch import MicroBatch, row_lengths
from serving.cotrainer.progress import Progress
from serving.cotrainer.quantum import Pieces
from serving.cotrainer.trainer import LoraTrainer
from serving.scores import Scores
from tests.toys.serving.peft_loop import (
    CUT,
    MICRO_BATCH,
    ROWS,
    SEQ_LEN,
    assert_equal_to_peft,
    build,
    drive,
    factors_of,
    plan,
    ragged_rows,
    reference,
)
from umbel.errors import TrainingError
from umbel.site.memory import ladder
from umbel.token_file import TokenFile


@pytest.fixture(scope="module")
def data() -> TokenFile:
    return ragged_rows()


@pytest.fixture
def trainer(tiny_llama: Path) -> LoraTrainer:
    return build(tiny_llama)


@pytest.fixture
def enough_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with the number of rows for which there is memory; without it there is enough."""
    file = tmp_path / "rows"
    monkeypatch.setenv(SCARCE, str(file))
    return file


@contextmanager
def failing_at(module: torch.nn.Module, call: int) -> Iterator[list[int]]:
    """Fail for want of memory when a module is called the n-th time; give the calls so far."""
    calls: list[int] = []

    def fail(*_: Any) -> None:
        calls.append(len(calls))
        if len(calls) == call:
            torch.empty(1 << 60, dtype=torch.uint8)

    handle = module.register_forward_pre_hook(fail)
    yield calls
    handle.remove()


@pytest.mark.parametrize("call", [1, 3, 11])
def test_a_step_that_failed_is_begun_again_with_fewer_rows_and_none_of_its_gradients(
    tiny_llama: Path, trainer: LoraTrainer, data: TokenFile, call: int
) -> None:
    """In a step's first micro-batch, in its second, and in that of the third step; the result is a peft loop's.

    Attention runs twice per micro-batch, on three rows and on one.
    """
    first: Any = trainer.layers[0]
    with failing_at(first.self_attn, call) as calls:
        assert_equal_to_peft(tiny_llama, trainer, plan(), data)
    assert len(calls) > call
    assert (trainer.pieces.micro_batch, trainer.pieces.recompute) == (MICRO_BATCH // 2, False)


@pytest.mark.parametrize("rows", [2, 1])
def test_rows_are_fewer_until_they_fit_and_stay_so(
    trainer: LoraTrainer, tiny_llama: Path, data: TokenFile, enough_for: Path, rows: int
) -> None:
    start = factors_of(reference(tiny_llama))
    enough_for.write_text(str(rows))
    drive(trainer, plan(steps=1), start, data)
    enough_for.unlink()
    trainer.pieces = CUT
    assert (trainer.pieces.micro_batch, trainer.pieces.recompute) == (rows, False)
    assert trainer.pieces.attention_rows == min(rows, CUT.attention_rows)
    assert trainer.pieces.mlp_tokens == CUT.mlp_tokens


def test_an_evaluation_that_failed_counts_no_row_twice(
    trainer: LoraTrainer, tiny_llama: Path, data: TokenFile, enough_for: Path
) -> None:
    source, results = factors_of(reference(tiny_llama)).__getitem__, list[Scores]()
    for call in (0, 2):  # the second piece of the head, when some of the scores have been added
        with failing_at(trainer.model.lm_head, call):
            for _ in trainer.evaluate(source, data, results):
                pass
    assert trainer.pieces.micro_batch == MICRO_BATCH // 2
    enough, scarce = results
    assert len(scarce.loss) == ROWS
    assert scarce.loss == pytest.approx(enough.loss, rel=1e-5)
    assert scarce.exact.tolist() == enough.exact.tolist()


def test_below_the_last_rung_the_job_fails_with_the_remedy_and_a_later_one_may_succeed(
    trainer: LoraTrainer, tiny_llama: Path, data: TokenFile, enough_for: Path
) -> None:
    start = factors_of(reference(tiny_llama))
    enough_for.write_text("0")
    for work in (
        trainer.train(plan(steps=1), start.__getitem__, data, Progress()),
        trainer.evaluate(start.__getitem__, data, []),
    ):
        with pytest.raises(TrainingError, match=r"\[training\]\.memory_mb"):
            list(work)
        assert (trainer.pieces.micro_batch, trainer.pieces.recompute) == (1, True)
    enough_for.unlink()
    assert_equal_to_peft(tiny_llama, trainer, plan(), data)


def test_another_error_is_not_taken_for_want_of_memory(trainer: LoraTrainer, tiny_llama: Path, data: TokenFile) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a bug")

    trainer.model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="a bug"):
        drive(trainer, plan(steps=1), factors_of(reference(tiny_llama)), data)
    assert trainer.pieces == CUT


def test_a_rehearsal_fails_at_once_so_that_its_rung_is_known_not_to_fit(trainer: LoraTrainer, enough_for: Path) -> None:
    enough_for.write_text("1")
    with pytest.raises(RuntimeError, match="memory"):
        list(trainer.rehearse(2, 16))
    assert trainer.pieces == CUT


@pytest.mark.parametrize(("micro_batch", "batch_size"), [(4, 7), (3, 8)])
def test_only_sizes_that_were_rehearsed_occur(
    trainer: LoraTrainer, tiny_llama: Path, data: TokenFile, micro_batch: int, batch_size: int, enough_for: Path
) -> None:
    """In training, in evaluation, and after memory did not suffice; most of them do occur."""
    sizes: set[tuple[int, ...]] = set()
    begin = trainer._begin

    def watched(batch: MicroBatch, pieces: Pieces) -> Any:
        sizes.add(tuple(batch.ids.shape))
        return begin(batch, pieces)

    trainer._begin = watched  # type: ignore[method-assign]
    trainer.lengths = row_lengths(SEQ_LEN)
    trainer.pieces = replace(CUT, micro_batch=micro_batch)
    list(trainer.warm_up())
    rehearsed, source = set(sizes), factors_of(reference(tiny_llama))
    assert rehearsed == {(rows, tokens) for rows in ladder(micro_batch) for tokens in (16, 20, 24)}
    sizes.clear()
    for rows in (9, 2):
        enough_for.write_text(str(rows))
        drive(trainer, plan(steps=20, batch_size=batch_size), source, data)
        list(trainer.evaluate(source.__getitem__, data, []))
    assert len(sizes) > len(rehearsed) / 2
    assert sizes <= rehearsed


def test_padded_rows_train_as_a_plain_peft_loop_does(tiny_llama: Path, trainer: LoraTrainer, data: TokenFile) -> None:
    trainer.lengths = row_lengths(SEQ_LEN)
    assert_equal_to_peft(tiny_llama, trainer, plan(), data)
