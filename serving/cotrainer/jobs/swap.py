"""`Swap`: hands the trainer's buffers from one job to another, a layer per quantum. There is one set of them.

A job whose turn is over is *parked*: its factors, AdamW's moments and FedProx's parent stay on the device, in memory
that is kept for it (`umbel.site.memory.parked_bytes`); gradients and activations are not, for there are none between
two steps.
"""

from collections import deque
from collections.abc import Sequence

import torch

from serving.cotrainer.jobs.job import Job
from serving.cotrainer.lora import LayerFactors
from serving.cotrainer.memory import OUT_OF_MEMORY, out_of_memory
from serving.cotrainer.quantum import Quanta, Quantum
from umbel.messages import JobState


class Swap:
    """Parks one job and resumes another. It runs to its end even if one of them ends meanwhile.

    Otherwise some layers of the one that stays would be in the buffers and some parked.
    """

    def __init__(self, layers: Sequence[LayerFactors], leaves: Job | None, comes: Job) -> None:
        """Prepare to park `leaves` (None: the buffers hold nothing that is needed), and to resume `comes`."""
        self.leaves, self.comes = leaves, comes
        self.next: Quantum | None = Quantum("swap")
        """The quantum that `advance` will run; None at the end."""
        self._resumes = bool(comes.parked)
        self._layers = deque(layers)

    @property
    def resumed(self) -> Job | None:
        """Return the job whose state is in the buffers at the end; None where there is none."""
        return self.comes if self._resumes and self.comes.open else None

    def advance(self) -> None:
        """Swap one layer. Where memory does not suffice, the job that was to be parked fails."""
        factors = self._layers.popleft()
        if self.leaves is not None and self.leaves.open:
            self._park(factors, self.leaves)
        if self.comes.parked:
            factors.resume(self.comes.parked.popleft())
        self.next = Quantum("swap") if self._layers else None

    def _park(self, factors: LayerFactors, job: Job) -> None:
        try:
            job.parked.append(factors.park())
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            reason = f"while another job had its turn, there was no room for what this one has learnt: {OUT_OF_MEMORY}"
            job.finish(JobState.FAILED, f"{reason} ({error})")


def rehearse_swap(layers: Sequence[LayerFactors]) -> Quanta:
    """Park and resume each layer at once, so that the quanta can be timed; it changes nothing."""
    for factors in layers:
        yield Quantum("swap")
        factors.resume(factors.park())


def room_to_park(layers: Sequence[LayerFactors], jobs: int) -> list[torch.Tensor]:
    """Return as much memory as so many parked jobs take, for the caller to hold while it measures the rest."""
    return [tensor for factors in layers for _ in range(jobs) for tensor in factors.room_to_park()]
