"""`Results`: the blocks of a benchmark run, read from its folder."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from serving.bench.metrics import (
    Block,
    Quality,
    Setting,
    attainment,
    paired_ratio,
    read_blocks,
)
from serving.bench.plan import FEASIBLE, SYSTEMS
from serving.cotrainer.governor import Slo
from umbel.errors import ConfigError

NONE = "–"


@dataclass(frozen=True)
class Results:
    """All blocks of a run that count, and what they are judged by."""

    blocks: tuple[Block, ...]
    setting: Setting
    quality: Quality
    facts: dict[str, object]
    void: int

    @property
    def slo(self) -> Slo:
        return self.setting.slo

    @property
    def conditions(self) -> list[str]:
        return [c for c in dict.fromkeys(b.condition for b in self.blocks if b.phase == "measure") if c != "none"]

    def of(self, condition: str, system: str, phase: str = "measure") -> list[Block]:
        return [b for b in self.blocks if (b.phase, b.condition, b.system) == (phase, condition, system)]

    def systems(self, condition: str) -> list[str]:
        present = {b.system for b in self.blocks if b.phase == "measure" and b.condition == condition}
        return [name for name in SYSTEMS if name in present]

    def harvest(self, condition: str, system: str) -> tuple[float, float, float]:
        """Training throughput relative to training alone: median over rounds, 95 % interval."""
        return paired_ratio(self.of(condition, system), self.of("none", "training"), lambda block: block.training_rate)

    def attained(self, condition: str, system: str) -> float:
        return attainment(self.of(condition, system), self.slo)

    def feasible(self, condition: str, system: str) -> bool:
        return self.attained(condition, system) >= FEASIBLE * self.attained(condition, "inference")


def read(out: Path) -> Results:
    """Raises ConfigError for a folder without a run."""
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


def interval(ratio: tuple[float, float, float]) -> str:
    middle, low, high = ratio
    return NONE if math.isnan(middle) else f"{middle:.2f} ({low:.2f}–{high:.2f})"
