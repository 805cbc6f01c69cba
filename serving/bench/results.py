"""`Results`: the blocks of a benchmark run, read from its folder."""

import json
from dataclasses import dataclass
from pathlib import Path

from serving.bench.intervals import Interval, ratio_of_shares
from serving.bench.metrics import Block, Quality, Setting, attained, paired_ratio, read_blocks
from serving.bench.plan import SYSTEMS
from serving.cotrainer.slo import Slo
from umbel.errors import ConfigError


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

    def attained(self, condition: str, system: str) -> Interval:
        """Return the attainment over all requests."""
        return attained(self.of(condition, system), self.slo)

    def kept(self, condition: str, system: str) -> Interval:
        """Return the attainment relative to that of inference only, over all requests."""
        return ratio_of_shares(self.attained(condition, system), self.attained(condition, "inference"))


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
