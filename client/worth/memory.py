"""`Memory`: what a site remembers of an adapter's rounds, to tell what is worth training; numbers and digests only."""

import io
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from client.worth.drift import PageHinkley
from client.worth.row_keys import Digests
from umbel.peft_dir import replace_durably

FILE, CONTENT = "worth.json", "content.npy"

logger = logging.getLogger(__name__)


class Body(BaseModel):
    """Base of what is kept as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DomainMemory(Body):
    """What is remembered of one domain."""

    trials: int = 0
    """Rounds in which it was trained, be it for a few steps."""
    rate: float = 0.0
    """Gain of its last burst, in nats per token and second of the device."""
    seconds: float = 0.0
    """Time of the device that its last round took."""
    flat: int = 0
    """Its last rounds, in a row, that ended because nothing more came."""
    needed: float = 0.0
    """Score below which it is left out; 0 unless several of them have."""
    reached: dict[int, float] = Field(default_factory=dict)
    """Content of each row that it was measured on → the loss that its last round has reached, in nats per token."""
    mean: float = 0.0
    """Mean of those losses."""
    spread: float = 0.0
    """Standard deviation of those losses; 0 where nothing was measured."""
    drift: PageHinkley = PageHinkley()
    tried: float = 0.0
    """Unix time of its last trial."""


class Memory(Body):
    """What is remembered of an adapter."""

    looks: int = 0
    """Rounds in which it was looked at."""
    domains: dict[str, DomainMemory] = Field(default_factory=dict)
    """Digest of a domain's name → what is remembered of it."""
    parent: str = ""
    """Digest of the adapter that the last round began with."""
    data: str = ""
    """Name of the folder of the data of that round."""
    reason: str = ""
    """Why that round was not worth training; empty where it was."""
    unadopted: int = 0
    """Updates in a row that were made from `parent` on `data`, and judged."""
    round: int = 0
    """Number of the round of the last one."""

    def domain(self, key: str) -> DomainMemory:
        """Return what is remembered of a domain, of a new one nothing."""
        return self.domains.get(key, DomainMemory())

    def with_domains(self, domains: Mapping[str, DomainMemory], **changes: object) -> "Memory":
        """Return the memory with changes, and domains in the place of those that had their names."""
        return self.model_copy(update={"domains": {**self.domains, **domains}, **changes})


def read(folder: Path) -> tuple[Memory, Digests]:
    """Return the memory and the content of all rows of the data that were looked at last; empty where there is none.

    What is damaged counts as nothing known, and the log says so: the next round then trains, and begins a new one.
    """
    nothing = Memory(), np.empty(0, np.uint64)
    if not (folder / FILE).is_file():
        return nothing
    try:
        memory = Memory.model_validate_json((folder / FILE).read_bytes())
        return memory, np.load(folder / CONTENT, allow_pickle=False).astype(np.uint64)
    except Exception as error:  # numpy parses the header as Python, and lets any error of that parser through
        logger.warning("worth.forgotten %s: what is worth training is measured anew (%s)", folder, type(error).__name__)
        return nothing


def write(folder: Path, memory: Memory, content: Digests) -> None:
    """Replace what is remembered; both files are their owner's only, as the folder is."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.save(buffer, np.unique(content), allow_pickle=False)
    replace_durably(folder / CONTENT, buffer.getvalue())
    replace_durably(folder / FILE, memory.model_dump_json().encode())
