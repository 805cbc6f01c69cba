"""Sizes are timed on a ladder that ends where memory or time does; the choice is the largest that is fast enough."""

import itertools
from pathlib import Path

import pytest
import torch
import transformers

from serving.cotrainer import calibration
from serving.cotrainer.calibration import Calibration
from serving.cotrainer.lanes.lane import CpuLane
from serving.cotrainer.quantum import Pieces, Quanta
from serving.cotrainer.trainer import LoraTrainer
from umbel.base.shapes import LINEARS
from umbel.errors import TrainingError

SEQ_LEN, ROWS = 48, [1, 2, 4]
ENOUGH_S = 1e6


@pytest.fixture
def trainer(tiny_llama: Path) -> LoraTrainer:
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    pieces = Pieces.whole(4, SEQ_LEN)
    return LoraTrainer(base, max_rank=4, target_modules=LINEARS, seq_len=SEQ_LEN, pieces=pieces)


def test_every_kind_is_timed_on_the_whole_ladder(trainer: LoraTrainer) -> None:
    found = calibration.calibrate(trainer, ROWS, budget_s=ENOUGH_S, max_bytes=None)
    sizes = {16, 32, SEQ_LEN, 2 * SEQ_LEN, 4 * SEQ_LEN}
    for kind in ("attention", "mlp", "mlp_backward", "attention_backward", "evaluate_attention", "evaluate_mlp"):
        assert found.seconds[kind].keys() == sizes
    assert found.seconds["head"].keys() == {15, 31, 47, 94, 188}, "the first token of a row is not predicted"
    assert all(
        found.seconds[kind].keys() == {0} for kind in ("load", "step", "optimizer", "copy_out", "swap", "checkpoint")
    )
    assert all(seconds > 0 for timed in found.seconds.values() for seconds in timed.values())
    assert list(found.peak_bytes) == ROWS
    assert list(found.peak_bytes.values()) == sorted(set(found.peak_bytes.values())), "more rows take more memory"


def test_the_longest_of_at_least_three_counts_and_the_first_does_not(trainer: LoraTrainer) -> None:
    """A clock by which the n-th piece of work takes n seconds: what is kept is the last of each size."""
    readings = (float(at * (at + 1) // 2) for number in itertools.count(1) for at in (number - 1, number))
    lane = CpuLane(clock=lambda: next(readings))
    found = calibration.calibrate(trainer, [1], budget_s=ENOUGH_S, max_bytes=None, lane=lane)
    per_step = 2 + 5 * len(trainer.layers) + 1  # the announcement, the step's rows, a layer's five kinds, the head
    assert found.seconds["optimizer"][0] == 3 * (1 + calibration.REPEATS) * per_step
    assert found.seconds["head"][SEQ_LEN - 1] == calibration.REPEATS * per_step + 2 + 2 * len(trainer.layers) + 1


def test_the_trainer_is_as_new_afterwards(trainer: LoraTrainer) -> None:
    calibration.calibrate(trainer, ROWS, budget_s=ENOUGH_S, max_bytes=None)
    assert trainer.pieces == Pieces.whole(4, SEQ_LEN)
    for factors in trainer.factors:
        assert not any(weight.any() or weight.grad.any() for pair in factors.pairs.values() for weight in pair)
        assert not any(moment.any() for state in factors.optimizer.state.values() for moment in state.values())


def test_time_that_is_up_leaves_the_smallest_micro_batch(trainer: LoraTrainer) -> None:
    found = calibration.calibrate(trainer, ROWS, budget_s=0.0, max_bytes=None)
    assert list(found.peak_bytes) == [1]
    assert found.seconds["mlp"].keys() == {SEQ_LEN}
    assert trainer.pieces.micro_batch == 1


def test_rungs_above_the_memory_limit_are_not_used(trainer: LoraTrainer) -> None:
    every = calibration.calibrate(trainer, ROWS, budget_s=ENOUGH_S, max_bytes=None).peak_bytes
    limited = calibration.calibrate(trainer, ROWS, budget_s=ENOUGH_S, max_bytes=(every[2] + every[4]) // 2)
    assert limited.peak_bytes == {1: every[1], 2: every[2]}
    assert not limited.recompute


def test_without_room_for_one_row_activations_are_recomputed(trainer: LoraTrainer) -> None:
    needed = calibration.calibrate(trainer, [1], budget_s=ENOUGH_S, max_bytes=None).peak_bytes[1]
    found = calibration.calibrate(trainer, ROWS, budget_s=ENOUGH_S, max_bytes=needed - 1)
    assert found.recompute
    assert found.peak_bytes[1] < needed
    assert trainer.pieces.recompute
    with pytest.raises(TrainingError, match="memory_mb"):
        calibration.calibrate(trainer, ROWS, budget_s=ENOUGH_S, max_bytes=1)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), RuntimeError("you tried: not enough memory")])
def test_out_of_memory_is_a_data_point(trainer: LoraTrainer, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    rehearse = trainer.rehearse

    def scarce(rows: int, tokens: int) -> Quanta:
        yield from rehearse(min(rows, 2), tokens)
        if rows > 2:
            raise error

    monkeypatch.setattr(trainer, "rehearse", scarce)
    assert list(calibration.calibrate(trainer, ROWS, budget_s=ENOUGH_S, max_bytes=None).peak_bytes) == [1, 2]


def test_any_other_error_is_not(trainer: LoraTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(rows: int, tokens: int) -> Quanta:
        raise RuntimeError("a bug")
        yield

    monkeypatch.setattr(trainer, "rehearse", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        calibration.calibrate(trainer, ROWS, budget_s=ENOUGH_S, max_bytes=None)


def made(scale: float = 1.0) -> Calibration:
    """A machine on which a token takes a millisecond forward, two backward, three in the head."""
    sizes = [16, 32, 64, 128, 256]
    per_token = {"attention": 1, "attention_backward": 2, "mlp": 1, "mlp_backward": 2, "head": 3}
    seconds = {kind: {size: scale * ms * size / 1000 for size in sizes} for kind, ms in per_token.items()}
    seconds["optimizer"] = {0: 0.005}
    return Calibration(key="k", seconds=seconds, peak_bytes={1: 100, 2: 200, 4: 400})


@pytest.mark.parametrize("longest_s", [0.032, 0.1, 0.128, 0.3, 0.6])
def test_pieces_are_the_largest_that_are_fast_enough(longest_s: float) -> None:
    pieces = calibration.choose_pieces(made(), 64, longest_s, None)
    backward = max(size for size in (16, 32, 64, 128, 256) if 2 * size / 1000 <= longest_s)
    assert pieces.micro_batch == 4
    assert pieces.mlp_tokens == backward, "the backward piece is the longer one"
    assert pieces.attention_rows == max(1, backward // 64)
    assert pieces.head_tokens == max([16] + [size for size in (16, 32, 64, 128, 256) if 3 * size / 1000 <= longest_s])


def test_where_nothing_is_fast_enough_the_smallest_is_chosen_and_can_be_told() -> None:
    pieces = calibration.choose_pieces(made(), 64, 0.001, None)
    assert (pieces.attention_rows, pieces.mlp_tokens, pieces.head_tokens) == (1, 16, 16)
    assert calibration.longest_quantum(made(), pieces, 64) == pytest.approx(0.128), "one row backward"


def test_memory_bounds_the_micro_batch() -> None:
    assert calibration.choose_pieces(made(), 64, 1.0, 250) == Pieces(2, 2, 256, 256)
    assert calibration.choose_pieces(made(), 64, 1.0, 50).micro_batch == 1


def test_what_was_saved_is_found_by_its_key_only(tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    assert Calibration.load(file, "k") is None
    made().save(file)
    assert Calibration.load(file, "k") == made()
    assert Calibration.load(file, "another") is None
    file.write_text('{"key": "k"')
    assert Calibration.load(file, "k") is None


def test_the_key_knows_what_a_calibration_depends_on(tiny_llama: Path, tiny_qwen2: Path, trainer: LoraTrainer) -> None:
    known = calibration.calibration_key(str(tiny_llama), trainer, None)
    assert calibration.calibration_key(str(tiny_llama), trainer, None) == known
    assert calibration.calibration_key(str(tiny_qwen2), trainer, None) != known
    assert calibration.calibration_key(str(tiny_llama), trainer, 1 << 20) != known, "other micro-batches fit"
    trainer.parked_bytes += 1
    others = calibration.calibration_key(str(tiny_llama), trainer, None)
    assert others != known, "the jobs of other adapters wait in that memory"
    trainer.parked_bytes -= 1
    trainer.seq_len += 1
    assert calibration.calibration_key(str(tiny_llama), trainer, None) != known
