"""What the daemon and the co-trainer say to each other, and the daemon's end of their socket (ZeroMQ)."""

import asyncio
from pathlib import Path
from typing import Any, Literal

import zmq
import zmq.asyncio
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt

from umbel import wire
from umbel.errors import TrainingError
from umbel.messages import Evaluation, JobState, TrainPlan
from umbel.peft_dir import replace_durably

REPLY_TIMEOUT_S = 30.0
"""An answer comes between two scheduler iterations; only a stuck or dead engine needs longer."""


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CoTrainerSettings(_Body):
    """`trainer.json` in the run directory: an engine that finds one trains, one that does not only serves."""

    max_rank: int
    target_modules: tuple[str, ...]
    micro_batch: int
    """At most this many rows per forward pass."""
    seq_len: int
    memory_mb: int | None = None
    share_floor: float = 0.0
    share_cap: float = 1.0
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    quantile: float = 0.99
    batch_factor: float = 10.0

    def write(self, run_dir: Path) -> None:
        replace_durably(run_dir / "trainer.json", self.model_dump_json(indent=2).encode())

    @classmethod
    def read(cls, run_dir: Path) -> "CoTrainerSettings | None":
        file = run_dir / "trainer.json"
        return cls.model_validate_json(file.read_text()) if file.is_file() else None


def socket_path(run_dir: Path) -> Path:
    return run_dir / "trainer.sock"


class TrainJob(_Body):
    """Continue from `parent` (a PEFT directory's weights file) on `data`, write the trained adapter to `output`."""

    id: str
    plan: TrainPlan
    parent: str
    data: str
    output: str


class EvaluateJob(_Body):
    """Evaluate an adapter's weights file (None: the base) on `data`."""

    id: str
    adapter: str | None
    data: str
    output: str | None = None
    """Where the scores of each example go (see `serving.scores`); the answer only ever has their sums."""


class StatusQuery(_Body):
    """Ask how the last job stands."""


class CancelJob(_Body):
    """Stop a job at its next quantum, if it is the current one."""

    id: str


class QuantumStats(_Body):
    count: NonNegativeInt = 0
    seconds: NonNegativeFloat = 0.0
    longest_s: NonNegativeFloat = 0.0


class PreemptionStats(_Body):
    """How training made way for requests that arrived while it ran."""

    arrivals: NonNegativeInt = 0
    """Requests that came to the engine."""
    count: NonNegativeInt = 0
    """Grants that a request cut short: at most one per arrival."""
    p50_s: NonNegativeFloat = 0.0
    p99_s: NonNegativeFloat = 0.0
    longest_s: NonNegativeFloat = 0.0
    """The quantum in whose course the request came: nothing waited longer."""


class SloStatus(_Body):
    """The targets in force, and how the governor stands to them."""

    ttft_ms: float
    tpot_ms: float
    quantile: float
    margin_ttft: float
    """The part of the target that the governor keeps back."""
    margin_tpot: float
    debt_s: NonNegativeFloat
    """Training that `share_floor` ran although the targets left no room for it."""
    answered: NonNegativeInt = 0
    """Requests answered since there are targets."""
    met: NonNegativeInt = 0
    """Those of them that met both."""


class CoTrainerStatus(_Body):
    """How the co-trainer stands; sent in answer to every message."""

    job: str | None = None
    state: JobState = JobState.QUEUED
    error: str = ""
    """Why the job failed, or why there is no co-training in this engine."""
    steps: NonNegativeInt = 0
    examples: NonNegativeInt = 0
    loss_tokens: NonNegativeInt = 0
    loss_sum: float = 0.0
    seconds: NonNegativeFloat = 0.0
    share: NonNegativeFloat = 0.0
    evaluation: Evaluation | None = None
    quanta: dict[str, QuantumStats] = Field(default_factory=dict)
    """Kind → since the engine's start."""
    longest_quantum_s: NonNegativeFloat = 0.0
    """The largest P99 of any kind and size of quantum."""
    pieces: dict[str, int] = Field(default_factory=dict)
    """How large the pieces of a layer are now, in rows and tokens."""
    slo: SloStatus | None = None
    """None until the engine's own latency is known; until then training is for idle time."""
    latency_known: bool = False
    """Whether the engine's latency can be predicted."""
    preemption: PreemptionStats = PreemptionStats()
    overlap: NonNegativeFloat = 1.0
    """Seconds that an iteration is delayed by one second of quanta."""
    hook_calls: dict[Literal["busy", "idle"], NonNegativeInt] = Field(default_factory=dict)
    most_quanta_while_waiting: NonNegativeInt = 0
    """The largest number of quanta that one hook call ran while a request waited: the bound is 1."""
    shared_tensors: NonNegativeInt = 0
    """Frozen parameters of the trainer that share storage with the engine's."""
    frozen_tensors: NonNegativeInt = 0
    state_bytes: NonNegativeInt = 0
    """LoRA weights, gradients and AdamW's moments."""
    kv_tokens_given_up: NonNegativeInt = 0
    """What `memory_mb` would hold of the KV cache."""
    memory: dict[str, NonNegativeInt] = Field(default_factory=dict)
    """Private bytes of the scheduler process at each stage of building the trainer, in order."""


class CoTrainerClient:
    """The daemon's end: one request, one answer."""

    def __init__(self, socket_path: Path) -> None:
        self._address = f"ipc://{socket_path}"
        self._context = zmq.asyncio.Context.instance()

    async def start(self, job: TrainJob | EvaluateJob) -> CoTrainerStatus:
        """Give it a job; raises TrainingError when it is busy with another or cannot train at all."""
        return await self._ask(job)

    async def status(self, timeout_s: float = REPLY_TIMEOUT_S) -> CoTrainerStatus:
        return await self._ask(StatusQuery(), timeout_s)

    async def cancel(self, job_id: str) -> CoTrainerStatus:
        return await self._ask(CancelJob(id=job_id))

    async def _ask(self, body: BaseModel, timeout_s: float = REPLY_TIMEOUT_S) -> CoTrainerStatus:
        socket: Any = self._context.socket(zmq.DEALER)
        socket.linger = 0
        try:
            socket.connect(self._address)
            await socket.send(wire.pack_model(body))
            async with asyncio.timeout(timeout_s):
                payload = await socket.recv()
        except TimeoutError as error:
            raise TrainingError(f"the co-trainer did not answer within {timeout_s:.0f} s") from error
        finally:
            socket.close()
        return wire.unpack_model(payload, CoTrainerStatus)
