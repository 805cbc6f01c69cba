"""`RoundFolder`: the files of one round at a site: the parent, what is trained of it, and the checkpoint on the way."""

import logging
from collections.abc import Mapping
from pathlib import Path

from client.data.prepare import Prepared
from client.rounds.personal import split
from serving.checkpoint import CheckpointHeader
from umbel import peft_dir
from umbel.errors import DataError
from umbel.messages import TrainPlan

PARENT, UPDATE = "parent.safetensors", "update.safetensors"
"""The adapter that was received, and the one that is sent."""
JOINED, TRAINED, PERSONAL = "joined.safetensors", "trained.safetensors", "personal.safetensors"
"""Files of a round with a personal part: the joined input, the trained output, the part that stays at the site."""
CHECKPOINT = "checkpoint.safetensors"
"""State of a round that is not over, from which it goes on (`serving.checkpoint`)."""
COURSE, BURSTS = "bursts.json", ("burst-*.safetensors", "*.npy")
"""Files of the bursts of a round: their results so far (`client.rounds.measured_round`), and what they need."""
CHECKPOINTS = 2
"""Checkpoints that are on disk at a time: the last one, and the next while it is written."""

logger = logging.getLogger(__name__)


class RoundFolder:
    """The folder of one round, which is made by `begin`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.parent, self.update, self.personal = path / PARENT, path / UPDATE, path / PERSONAL
        self.checkpoint = path / CHECKPOINT

    def begin(self, files: Mapping[str, bytes]) -> None:
        """Write the files that a round begins with."""
        self.path.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            peft_dir.replace_durably(self.path / name, content)

    def start(self, plan: TrainPlan) -> Path:
        """Return the file that is trained from."""
        return self.path / (JOINED if plan.personal else PARENT)

    def output(self, plan: TrainPlan) -> Path:
        """Return the file that the co-trainer writes."""
        return self.path / (TRAINED if plan.personal else UPDATE)

    def part(self, trained: peft_dir.Tensors, blob: bytes, plan: TrainPlan) -> bytes:
        """Return the bytes that are sent of what was trained, of which a personal part is put aside."""
        if plan.personal is None:
            return blob
        sent, own = split(trained, peft_dir.decode(self.parent.read_bytes()), plan.personal)
        blob = peft_dir.encode(sent)
        peft_dir.replace_durably(self.personal, peft_dir.encode(own))
        peft_dir.replace_durably(self.update, blob)
        return blob

    def steps(self) -> int:
        """Return the optimizer steps of the checkpoint; 0 without one that can be read."""
        try:
            return CheckpointHeader.read(self.checkpoint).steps if self.checkpoint.exists() else 0
        except DataError:
            return 0

    def goes_on(self, data: Prepared) -> int:
        """Return the steps of the checkpoint, which is removed if it cannot be gone on from with `data`."""
        if not self.checkpoint.exists():
            return 0
        try:
            header = CheckpointHeader.read(self.checkpoint)
        except DataError as error:
            why = str(error)
        else:
            if header.origin.data.path == str(data.train):
                return header.steps
            why = "its data has changed"
        logger.warning("round.anew key=%s after a break it begins again: %s", self.path.name, why)
        self.forget_checkpoint()
        return 0

    def forget_checkpoint(self) -> None:
        """Remove all that a round goes on from, once the co-trainer writes none any more: it holds what was learnt."""
        for pattern in (COURSE, *BURSTS):
            for file in self.path.glob(pattern):
                file.unlink()
        self.checkpoint.unlink(missing_ok=True)
        self.checkpoint.with_name(f".{CHECKPOINT}.tmp").unlink(missing_ok=True)
