"""`Results`: the blocks of a benchmark run, read from its folder."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from serving.bench.intervals import Interval, paired, ratio_of_shares
from serving.bench.metrics import Block, Quality, Setting, attained, paired_ratio, read_blocks
from serving.bench.plan import SYSTEMS
from serving.cotrainer.slo import Slo
from umbel.errors import ConfigError


@dataclass(frozen=True)
class CoreTime:
    """Uses of the engine's core, as shares of its time: means over the rounds."""

    alone: float
    """Used by the engine in the same rounds of inference only."""
    trainer: float
    """In quanta, or in a trainer of its own process."""
    hooks: float | None
    """In the co-trainer's hooks, beside the quanta; None for a trainer of its own process."""
    jobless: float | None
    """Part of the time in which no job was there to be trained, between two rounds; None if nobody counted."""
    beyond: float
    """Used by the engine beyond what it uses alone: publications, dearer iterations, smaller batches."""
    unused: float
    speed: float
    """Tokens per second of `trainer`, relative to training alone."""


@dataclass(frozen=True)
class Results:
    """The valid blocks of a run, its targets and the quality of its versions."""

    blocks: tuple[Block, ...]
    setting: Setting
    quality: Quality
    facts: dict[str, object]
    """Contents of `run.json`: the machine and the trace."""
    void: int
    """Number of blocks left out because the client's core was too busy."""

    @property
    def slo(self) -> Slo:
        return self.setting.slo

    @property
    def conditions(self) -> list[str]:
        """Return the measured conditions in order, without training alone."""
        return [c for c in dict.fromkeys(b.condition for b in self.blocks if b.phase == "measure") if c != "none"]

    def of(self, condition: str, system: str, phase: str = "measure") -> list[Block]:
        """Return the blocks of a system under a condition."""
        return [b for b in self.blocks if (b.phase, b.condition, b.system) == (phase, condition, system)]

    def systems(self, condition: str) -> list[str]:
        """Return the systems measured under a condition, in the order of `SYSTEMS`."""
        present = {b.system for b in self.blocks if b.phase == "measure" and b.condition == condition}
        return [name for name in SYSTEMS if name in present]

    def harvest(self, condition: str, system: str) -> Interval:
        """Return the training throughput relative to training alone."""
        return paired_ratio(self.of(condition, system), self.of("none", "training"), lambda block: block.training_rate)

    def left(self, condition: str) -> float:
        """Return the mean share of its core that the engine leaves when it only serves; NaN if it was not measured."""
        return 1 - _mean([block.engine_share for block in self.of(condition, "inference")])

    def reached(self, condition: str, system: str) -> Interval:
        """Return the harvest relative to what the engine leaves of its core in the same round: the most there is."""
        full = {block.round: block.training_rate for block in self.of("none", "training")}
        left = {block.round: 1 - block.engine_share for block in self.of(condition, "inference")}
        blocks = [block for block in self.of(condition, system) if block.round in full and block.round in left]
        return paired([(block.training_rate, full[block.round] * left[block.round]) for block in blocks])

    def core_time(self, condition: str, system: str) -> CoreTime | None:
        """Return where the core's time went; None where it was not measured."""
        alone = {block.round: block.engine_share for block in self.of(condition, "inference")}
        blocks = [
            b for b in self.of(condition, system) if b.round in alone and (b.spent is None) == (b.trainer_share > 0)
        ]
        per_second = _tokens_per_second(self.of("none", "training"))
        if not blocks or not per_second:
            return None
        served = _mean([alone[block.round] for block in blocks])
        trainer = _mean([_trainer(block) for block in blocks])
        spent = [(block.spent, block.window) for block in blocks if block.spent]
        hooks = _mean([one.hooks_s / window for one, window in spent]) if spent else None
        jobless = _mean([one.jobless_s / window for one, window in spent]) if spent else None
        engine = _mean([block.engine_share for block in blocks])
        inside = trainer + hooks if hooks is not None else 0.0
        beyond = engine - inside - served
        return CoreTime(
            alone=served, trainer=trainer, hooks=hooks, jobless=jobless, beyond=beyond,
            unused=1 - served - trainer - (hooks or 0.0) - beyond, speed=_tokens_per_second(blocks) / per_second,
        )  # fmt: skip

    def attained(self, condition: str, system: str) -> Interval:
        """Return the attainment over all requests."""
        return attained(self.of(condition, system), self.slo)

    def kept(self, condition: str, system: str) -> Interval:
        """Return the attainment relative to that of inference only, over all requests."""
        return ratio_of_shares(self.attained(condition, system), self.attained(condition, "inference"))


def _trainer(block: Block) -> float:
    """Return the share of the engine's core in which a block's trainer computed."""
    return block.spent.quanta_s / block.window if block.spent else block.trainer_share


def _tokens_per_second(blocks: list[Block]) -> float:
    """Return the tokens per second in which the blocks' trainer computed; 0 if it did not."""
    computed = sum(_trainer(block) * block.window for block in blocks)
    return sum(block.tokens for block in blocks) / computed if computed else 0.0


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else math.nan


def read(out: Path) -> Results:
    """Read a run's folder. Raises ConfigError if there is none in it."""
    files = [out / name for name in ("blocks.jsonl", "setting.json", "run.json")]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ConfigError(f"{out}: no run here that has come far enough ({', '.join(missing)} missing)")
    blocks = read_blocks(out)
    quality_file = out / "quality.json"
    quality = json.loads(quality_file.read_text()) if quality_file.is_file() else {}
    return Results(
        blocks=tuple(block for block in blocks if not block.void),
        setting=Setting(**json.loads(files[1].read_text())),
        quality=quality,
        facts=json.loads(files[2].read_text()),
        void=sum(block.void for block in blocks),
    )
