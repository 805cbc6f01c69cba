"""The speed of an engine is measured once and kept; pieces and targets follow from it."""

import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from serving.cotrainer import tuning as tuning_module
from serving.cotrainer.lanes.lane import CpuLane
from serving.cotrainer.lora import LayerFactors
from serving.cotrainer.predictor import PredictorState
from serving.cotrainer.quantum import Quanta
from serving.cotrainer.slo import Slo
from serving.cotrainer.trainer import LoraTrainer
from serving.cotrainer.tuning import RESIZE_S, Tuning
from tests.toys.scheduler import trainer_settings
from tests.toys.serving.latencies import DECODE_S, PREFILL_S, known
from tests.toys.serving.peft_loop import MICRO_BATCH, SEQ_LEN, WHOLE, build

Tuned = Callable[..., Tuning]


@pytest.fixture(scope="module")
def trainer(tiny_llama: Path) -> LoraTrainer:
    return build(tiny_llama, WHOLE)


@pytest.fixture
def tuned(trainer: LoraTrainer, tiny_llama: Path, tmp_path: Path) -> Tuned:
    """Make a tuning that has calibrated; each one is another start of the same engine."""

    def start(**changes: Any) -> Tuning:
        trainer.pieces = WHOLE
        made = Tuning(trainer_settings(micro_batch=MICRO_BATCH, seq_len=SEQ_LEN, **changes), tmp_path)
        made.calibrate(trainer, str(tiny_llama), CpuLane())
        return made

    return start


def test_a_second_start_measures_nothing(tuned: Tuned, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tuned()
    monkeypatch.setattr(tuning_module, "calibrate", None)
    second = tuned()
    assert second.predictor.longest_quantum() == first.predictor.longest_quantum() > 0


def test_another_engine_measures_anew(tuned: Tuned, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned()
    monkeypatch.setattr(tuning_module, "calibration_key", lambda *_: "another")
    monkeypatch.setattr(tuning_module, "calibrate", None)
    with pytest.raises(TypeError):
        tuned()


def test_targets_of_the_site_file_are_known_at_once(tuned: Tuned) -> None:
    slo = tuned(ttft_ms=200.0, tpot_ms=30.0, quantile=0.9, batch_factor=4.0).slo
    assert slo == Slo(0.2, 0.03, 0.9, 4.0)


@pytest.mark.parametrize(
    ("settings", "ttft_s", "tpot_s"),
    [({}, 3 * (PREFILL_S + DECODE_S), 2 * DECODE_S), ({"ttft_ms": 200.0}, 0.2, 2 * DECODE_S)],
)
def test_missing_targets_follow_once_the_engine_is_known(
    tuned: Tuned, trainer: LoraTrainer, settings: dict[str, float], ttft_s: float, tpot_s: float
) -> None:
    tuning = tuned(**settings)
    assert (tuning.slo, tuning.pieces) == (None, None)
    assert not tuning.resize(trainer, now=0.0)
    tuning.predictor.resume(known().state)
    assert tuning.resize(trainer, now=0.0)
    assert tuning.slo is not None
    assert (tuning.slo.ttft_s, tuning.slo.tpot_s) == (pytest.approx(ttft_s), pytest.approx(tpot_s))


def learnt(decode_s: float, typical_s: float, per_token_s: float) -> PredictorState:
    return PredictorState(
        coefficients={"decode": (decode_s, 0.0, 0.0), "prefill": (PREFILL_S, per_token_s, 0.0, 0.0)},
        high={"decode": 1.0, "prefill": 1.0},
        typical={"decode": typical_s, "prefill": PREFILL_S},
    )


def test_a_default_follows_what_prompts_need_and_not_how_busy_the_engine_is(tuned: Tuned, trainer: LoraTrainer) -> None:
    """Longer prompts come than the engine was measured with; larger batches, which are slower; an adapter."""
    tuning = tuned()
    tuning.predictor.resume(known().state)
    assert tuning.resize(trainer, now=0.0)
    assert tuning.slo is not None
    assert tuning.slo.ttft_per_token_s == pytest.approx(0.0)
    tuning.predictor.resume(learnt(DECODE_S, 4 * DECODE_S, per_token_s=1e-3))
    assert tuning.resize(trainer, now=RESIZE_S)
    assert (tuning.slo.ttft_per_token_s, tuning.slo.tpot_s) == (pytest.approx(3e-3), pytest.approx(2 * DECODE_S))
    tuning.predictor.resume(learnt(1.5 * DECODE_S, 4 * DECODE_S, per_token_s=1e-3))
    assert tuning.resize(trainer, now=2 * RESIZE_S)
    assert tuning.slo.tpot_s == pytest.approx(3 * DECODE_S), "an adapter answers now, and needs more for each token"


def test_targets_that_were_given_follow_nothing(tuned: Tuned, trainer: LoraTrainer) -> None:
    site, bench = tuned(ttft_ms=200.0), tuned()
    for tuning in (site, bench):
        tuning.predictor.resume(known().state)
        assert tuning.resize(trainer, now=0.0)
    bench.retarget(Slo.usual(0.3, 0.02))
    for tuning, ttft_s in ((site, 0.2), (bench, 0.3)):
        tuning.predictor.resume(learnt(2 * DECODE_S, DECODE_S, per_token_s=1e-3))
        assert tuning.resize(trainer, now=RESIZE_S)
        assert tuning.slo is not None
        assert (tuning.slo.ttft_s, tuning.slo.ttft_per_token_s) == (ttft_s, 0.0)


def test_pieces_are_chosen_anew_after_a_while_or_for_other_targets(tuned: Tuned, trainer: LoraTrainer) -> None:
    tuning = tuned(ttft_ms=1e6, tpot_ms=1e6)
    assert tuning.resize(trainer, now=10.0)
    assert tuning.pieces is not None
    loose = tuning.pieces
    assert not tuning.resize(trainer, now=10.0 + RESIZE_S / 2)
    assert tuning.resize(trainer, now=10.0 + RESIZE_S)
    tuning.retarget(Slo.usual(1e-6, 1e-6))
    assert tuning.resize(trainer, now=10.1 + RESIZE_S)
    assert tuning.pieces.mlp_tokens < loose.mlp_tokens == MICRO_BATCH * SEQ_LEN
    assert tuning.idle_pieces == tuning.pieces


def test_latencies_are_kept_for_the_next_start_of_the_same_engine(
    tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning = tuned()
    tuning.save()
    assert not (tmp_path / "latency.json").exists(), "nothing is known yet"
    tuning.predictor.resume(known().state)
    tuning.save()
    until = time.monotonic() + 20
    while not (tmp_path / "latency.json").exists() and time.monotonic() < until:
        time.sleep(0.01)
    assert tuned().predictor.typical("decode") == DECODE_S
    monkeypatch.setattr(tuning_module, "calibration_key", lambda *_: "another")
    assert not tuned().predictor.ready
    (tmp_path / "latency.json").write_text("{")
    assert not tuned().predictor.ready


@pytest.mark.parametrize(("memory_mb", "left"), [(None, lambda _: None), (50, lambda state: (50 << 20) - state // 2)])
def test_quanta_may_take_what_factors_and_gradients_leave(
    tuned: Tuned, trainer: LoraTrainer, memory_mb: int | None, left: Callable[[int], int | None]
) -> None:
    assert tuned(memory_mb=memory_mb).beside(trainer) == left(trainer.state_bytes)


def test_quanta_are_measured_while_others_jobs_have_their_memory(
    tuned: Tuned, trainer: LoraTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when nothing is measured, and what is rehearsed only takes its memory."""
    sizes: list[int] = []
    rehearse, take = trainer.rehearse, LayerFactors.room_to_park
    taken: list[weakref.ref[torch.Tensor]] = []

    def noted(factors: LayerFactors) -> list[torch.Tensor]:
        room = take(factors)
        taken.extend(weakref.ref(tensor) for tensor in room)
        return room

    def rehearsed(rows: int, tokens: int) -> Quanta:
        sizes.append(sum(tensor.nbytes for one in taken if (tensor := one()) is not None))
        yield from rehearse(rows, tokens)

    monkeypatch.setattr(LayerFactors, "room_to_park", noted)
    monkeypatch.setattr(trainer, "rehearse", rehearsed)
    for _ in range(2):
        tuned(adapters=3)
    assert set(sizes) == {2 * trainer.state_bytes}, "as large as factors, gradients and moments, for each of two"
    assert all(one() is None for one in taken), "and is given back"
