"""What is known of this engine's speed, kept from start to start, and the sizes and targets that follow from it."""

import logging
import math
import threading
from pathlib import Path

from pydantic import ValidationError

from serving.cotrainer import calibration as sizing
from serving.cotrainer.governor import Slo, default_slo, idle_quantum_target, quantum_target
from serving.cotrainer.lane import Lane
from serving.cotrainer.predictor import Predictor, PredictorState
from serving.cotrainer.quantum import Pieces
from serving.cotrainer.trainer import LoraTrainer
from serving.trainer_socket import CoTrainerSettings
from umbel.peft_dir import replace_durably

CALIBRATION_S = 3.0
RESIZE_S = 5.0
"""Between two looks at whether pieces still have the right size for how busy the engine is."""

logger = logging.getLogger(__name__)


class Tuning:
    """Latencies of iterations and quanta of one engine on one machine."""

    def __init__(self, settings: CoTrainerSettings, run_dir: Path) -> None:
        self.predictor = Predictor()
        self.slo: Slo | None = None
        """The targets: those of the site file, or what follows from the engine's own latency once that is known."""
        self.pieces: Pieces | None = None
        """While users are served; None until the targets are known."""
        self.idle_pieces: Pieces | None = None
        self._settings = settings
        self._calibration_file = run_dir / "calibration.json"
        self._latency_file = run_dir / "latency.json"
        self._calibration: sizing.Calibration | None = None
        self._key = ""
        self._resized_at: float | None = None

    def calibrate(self, trainer: LoraTrainer, model_path: str, lane: Lane) -> None:
        """Time each quantum on a ladder of sizes, or find what was timed; the largest batch is run either way."""
        settings = self._settings
        self._key = sizing.key(model_path, trainer)
        self._calibration = sizing.Calibration.load(self._calibration_file, self._key)
        if self._calibration is None:
            rows = [1 << power for power in range(settings.micro_batch.bit_length())]
            rows = sorted({*rows, settings.micro_batch})
            self._calibration = sizing.calibrate(
                trainer, rows, budget_s=CALIBRATION_S, max_bytes=self._max_bytes, lane=lane
            )
            self._calibration = self._calibration.model_copy(update={"key": self._key})
            self._calibration.save(self._calibration_file)
        else:
            trainer.pieces = sizing.choose(self._calibration, settings.seq_len, math.inf, self._max_bytes)
            lane.run(trainer.warm_up)
            lane.elapsed()
        for kind, sizes in self._calibration.seconds.items():
            for tokens, seconds in sizes.items():
                self.predictor.seed_quantum(kind, tokens, seconds)
        self.predictor.resume(self._remembered())
        self.slo = self._targets()

    def aim(self, slo: Slo) -> None:
        """Other targets than before, from now on."""
        self.slo, self._resized_at = slo, None

    def resize(self, trainer: LoraTrainer, now: float) -> bool:
        """Choose the largest pieces that the targets allow now; False while there is nothing to choose anew."""
        if self._calibration is None or (self._resized_at is not None and now - self._resized_at < RESIZE_S):
            return False
        self.slo = self.slo or self._targets()
        if self.slo is None:
            return False
        self._resized_at = now
        accelerator = trainer.model.device.type != "cpu"
        target = quantum_target(self.slo, self.predictor, accelerator)
        before = self.pieces
        self.pieces = self._choose(self._calibration, target)
        self.idle_pieces = self._choose(self._calibration, idle_quantum_target(self.slo, target))
        if self.pieces != before:
            self.predictor.plan_quanta(sizing.longest(self._calibration, self.pieces, self._settings.seq_len))
        return True

    def _choose(self, calibration: sizing.Calibration, longest_s: float) -> Pieces:
        return sizing.choose(calibration, self._settings.seq_len, longest_s, self._max_bytes)

    def save(self) -> None:
        """Write down what was learnt of iterations, from a thread: a disk is nothing to wait for between two tokens."""
        state = self.predictor.state.model_copy(update={"key": self._key})
        if self.predictor.ready:
            content = state.model_dump_json().encode()
            threading.Thread(target=replace_durably, args=(self._latency_file, content), daemon=True).start()

    @property
    def _max_bytes(self) -> int | None:
        return None if self._settings.memory_mb is None else self._settings.memory_mb << 20

    def _remembered(self) -> PredictorState:
        try:
            state = PredictorState.model_validate_json(self._latency_file.read_bytes())
        except (OSError, ValidationError):  # the first start, or a damaged file: it is learnt again
            return PredictorState()
        return state if state.key == self._key else PredictorState()

    def _targets(self) -> Slo | None:
        """The site's targets, completed by the defaults; None while those cannot be known."""
        settings = self._settings
        measured = default_slo(self.predictor)
        if settings.ttft_ms is not None and settings.tpot_ms is not None:
            ttft_s, tpot_s = settings.ttft_ms / 1000, settings.tpot_ms / 1000
        elif measured is None:
            return None
        else:
            ttft_s = measured.ttft_s if settings.ttft_ms is None else settings.ttft_ms / 1000
            tpot_s = measured.tpot_s if settings.tpot_ms is None else settings.tpot_ms / 1000
        return Slo(ttft_s, tpot_s, settings.quantile, settings.batch_factor)
