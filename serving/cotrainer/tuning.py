"""`Tuning`: the measured speed of one engine, kept from start to start, with the targets and piece sizes it implies."""

import logging
import math
import threading
from dataclasses import replace
from pathlib import Path

import torch
from pydantic import ValidationError

from serving.cotrainer.calibration import (
    Calibration,
    calibrate,
    calibration_key,
    choose_pieces,
    longest_quantum,
    timed,
)
from serving.cotrainer.jobs.swap import room_to_park
from serving.cotrainer.lanes.lane import CpuLane, Lane
from serving.cotrainer.memory import out_of_memory
from serving.cotrainer.predictor import Predictor, PredictorState
from serving.cotrainer.quantum import Pieces
from serving.cotrainer.slo import Slo, default_slo, idle_quantum_target, quantum_target
from serving.cotrainer.trainer import LoraTrainer
from serving.trainer_socket import CoTrainerSettings
from umbel.peft_dir import replace_durably

CALIBRATION_S = 3.0
"""Time budget of a calibration."""
RESIZE_S = 5.0
"""Between two checks whether the pieces still have the right size for how busy the engine is."""

logger = logging.getLogger(__name__)


class Tuning:
    """Latencies of iterations and quanta of one engine on one machine, in two files of its run directory."""

    def __init__(self, settings: CoTrainerSettings, run_dir: Path) -> None:
        self.predictor = Predictor()
        self.slo: Slo | None = None
        """The targets of the site file, completed from the engine's own latency; None until that is known.

        What is completed follows that latency: longer prompts may come than those it was measured with, or an adapter.
        """
        self.pieces: Pieces | None = None
        """Pieces for a busy engine; None until the targets are known."""
        self.idle_pieces: Pieces | None = None
        """Pieces while nobody is served; None until the targets are known."""
        self._settings = settings
        self._calibration_file = run_dir / "calibration.json"
        self._latency_file = run_dir / "latency.json"
        self._calibration: Calibration | None = None
        self._key = ""
        self._resized_at: float | None = None
        self._retargeted = False

    def calibrate(self, trainer: LoraTrainer, model_path: str, lane: Lane) -> None:
        """Time the trainer's quanta, or read what an earlier start measured under the same conditions.

        A step on the largest micro-batch is run either way, so that its memory is there before users come, beside that
        of jobs which wait. Raises TrainingError where not even the smallest one fits into memory.
        """
        settings = self._settings
        waiting = _room_to_park(trainer, settings.adapters - 1, lane)
        self._key = calibration_key(model_path, trainer, self._max_bytes)
        self._calibration = Calibration.load(self._calibration_file, self._key)
        if self._calibration is None:
            rows = [1 << power for power in range(settings.micro_batch.bit_length())]
            rows = sorted({*rows, settings.micro_batch})
            self._calibration = calibrate(
                trainer,
                rows,
                budget_s=CALIBRATION_S,
                max_bytes=self._max_bytes,
                lane=None if isinstance(lane, CpuLane) else lane,
            )
            self._calibration = self._calibration.model_copy(update={"key": self._key})
            self._calibration.save(self._calibration_file)
        else:
            trainer.pieces = choose_pieces(self._calibration, settings.seq_len, math.inf, self._max_bytes)
            for _ in timed(trainer.warm_up(), lane):
                pass
        del waiting
        for kind, sizes in self._calibration.seconds.items():
            for tokens, seconds in sizes.items():
                self.predictor.seed_quantum(kind, tokens, seconds)
        self.predictor.resume(self._remembered())
        self.slo = self._targets()

    def beside(self, trainer: LoraTrainer) -> int | None:
        """Return the bytes that are left to quanta beside the factors and their gradients; None: any number."""
        return None if self._max_bytes is None else max(0, self._max_bytes - trainer.state_bytes // 2)

    def retarget(self, slo: Slo) -> None:
        """Replace the targets, and have pieces chosen anew at the next `resize`.

        Only the benchmark does so, which switches targets while an engine runs.
        """
        self.slo, self._resized_at, self._retargeted = slo, None, True

    def resize(self, trainer: LoraTrainer, now: float) -> bool:
        """Choose the largest pieces that the targets allow; return False if it is not yet time, or not yet possible.

        `now` is in seconds on the co-trainer's clock.
        """
        if self._calibration is None or (self._resized_at is not None and now - self._resized_at < RESIZE_S):
            return False
        if not self._retargeted:
            self.slo = self._targets()
        if self.slo is None:
            return False
        self._resized_at = now
        target = quantum_target(self.slo, self.predictor)
        before = self.pieces
        self.pieces = self._choose(self._calibration, target)
        self.idle_pieces = self._choose(self._calibration, idle_quantum_target(self.slo, target))
        if self.pieces != before:
            longest = longest_quantum(self._calibration, self.pieces, self._settings.seq_len)
            self.predictor.plan_quanta(longest)
        return True

    def _choose(self, calibration: Calibration, longest_s: float) -> Pieces:
        return choose_pieces(calibration, self._settings.seq_len, longest_s, self._max_bytes)

    def save(self) -> None:
        """Write the learnt latencies to disk, from a thread: between two tokens nothing may wait for a disk."""
        state = self.predictor.state.model_copy(update={"key": self._key})
        if self.predictor.ready:
            content = state.model_dump_json().encode()
            threading.Thread(target=replace_durably, args=(self._latency_file, content), daemon=True).start()

    @property
    def _max_bytes(self) -> int | None:
        return None if self._settings.memory_mb is None else self._settings.memory_mb << 20

    def _remembered(self) -> PredictorState:
        """Return the latencies that an earlier start saved under the same conditions; an empty state without any."""
        try:
            state = PredictorState.model_validate_json(self._latency_file.read_bytes())
        except (OSError, ValidationError):  # the first start, or a damaged file: it is learnt again
            return PredictorState()
        return state if state.key == self._key else PredictorState()

    def _targets(self) -> Slo | None:
        """Return the site's targets, completed by the defaults; None while a default is needed and not yet known."""
        settings = self._settings
        given: dict[str, float] = {"quantile": settings.quantile, "batch_factor": settings.batch_factor}
        if settings.ttft_ms is not None:
            given |= {"ttft_s": settings.ttft_ms / 1000, "ttft_per_token_s": 0.0}
        if settings.tpot_ms is not None:
            given["tpot_s"] = settings.tpot_ms / 1000
        if settings.ttft_ms is not None and settings.tpot_ms is not None:
            return Slo(**given)
        measured = default_slo(self.predictor)
        return None if measured is None else replace(measured, **given)


def _room_to_park(trainer: LoraTrainer, jobs: int, lane: Lane) -> list[torch.Tensor]:
    """Take the memory in which so many jobs may wait; none where it is not there, and calibration will say so."""
    try:
        taken = lane.run(lambda: room_to_park(trainer.factors, jobs))
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        taken = []
    lane.wait(math.inf)
    lane.ended()
    return taken
