"""Messages between the daemon and the co-trainer, and `CoTrainerClient`: the daemon's end of their ZeroMQ socket."""

import asyncio
from pathlib import Path
from typing import Any, Literal, Self

import zmq
import zmq.asyncio
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from umbel import wire
from umbel.errors import CoTrainerSilent
from umbel.messages import Evaluation, JobState, TrainPlan
from umbel.peft_dir import replace_durably
from umbel.site.config import SiteConfig

REPLY_TIMEOUT_S = 30.0
"""The co-trainer answers between two scheduler iterations; only a stuck or dead engine needs longer."""
DAEMON_KEYS = {"data", "eval_data", "eval_fraction", "checkpoint_s", "worth"}
"""Keys of [training] that the daemon uses itself, for the data and the jobs. The co-trainer gets every other key."""


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CoTrainerSettings(_Body):
    """`trainer.json` in the run directory. An engine that finds the file trains; without it an engine only serves.

    No field has a default: [training] and [slo] of the site file state them, in `umbel.site.sections`.
    """

    max_rank: int
    """Largest rank of a trained adapter, that of [engine].max_lora_rank."""
    target_modules: tuple[str, ...]
    """Linear layers that are adapted, from [engine].target_modules."""
    adapters: PositiveInt
    """Number of tables [[adapter]]: jobs of so many take turns."""
    micro_batch: int
    """Maximum number of rows per forward pass."""
    seq_len: int
    """Tokens per row."""
    memory_mb: int | None
    share_floor: float
    share_cap: float
    ttft_ms: float | None
    tpot_ms: float | None
    quantile: float
    batch_factor: float

    @classmethod
    def of(cls, config: SiteConfig) -> Self:
        """Take the settings from a site file: all of [slo], and [training] without `DAEMON_KEYS`.

        Raises ValidationError for a key that stands in one of these tables and is no field here.
        """
        return cls(
            max_rank=config.engine.max_lora_rank,
            target_modules=config.engine.target_modules,
            adapters=len(config.adapter),
            **config.training.model_dump(exclude=DAEMON_KEYS),
            **config.slo.model_dump(),
        )

    def write(self, run_dir: Path) -> None:
        """Write `trainer.json`; it is on disk on return."""
        replace_durably(run_dir / "trainer.json", self.model_dump_json(indent=2).encode())

    @classmethod
    def read(cls, run_dir: Path) -> "CoTrainerSettings | None":
        """Read `trainer.json`; None where there is none. Raises ValidationError for a damaged file."""
        file = run_dir / "trainer.json"
        return cls.model_validate_json(file.read_text()) if file.is_file() else None


def socket_path(run_dir: Path) -> Path:
    """Return the path of the co-trainer's Unix socket."""
    return run_dir / "trainer.sock"


class TrainJob(_Body):
    """Continue from `parent` (the weights file of a PEFT directory) on `data`; write the trained adapter to `output`.

    `data` is a token file (`umbel.token_file`); all paths are absolute. A job that left its state in a `checkpoint` is
    gone on with by another one, with any id: the same plan, parent and data, and a higher `until` or none.
    """

    id: str
    plan: TrainPlan
    parent: str
    data: str
    output: str
    share: PositiveFloat = Field(default=1.0, allow_inf_nan=False)
    """Its part of the training time while other jobs train, too, in proportion to theirs."""
    checkpoint: str | None = None
    """File of its state (`serving.checkpoint`). Training goes on from it if it is of this job; one that is damaged, or
    of another plan, parent or data, is not used, and the log says so. None: there is none."""
    checkpoint_s: NonNegativeFloat = 0.0
    """Seconds of the job between two times that the file is replaced; 0: only at `until`."""
    until: PositiveInt | None = None
    """Optimizer steps in all at which it ends before its plan does, those of before the checkpoint included; what it
    has come to is in `output`, and its state in `checkpoint`."""
    rows: str | None = None
    """.npy of int32, the numbers of the rows of `data` to draw from; None: all. The order begins anew where they are
    other ones than the checkpoint's."""


class EvaluateJob(_Body):
    """Evaluate an adapter's weights file (None: the base) on `data`; it goes before all training."""

    id: str
    adapter: str | None
    data: str
    output: str | None = None
    """File for the scores of each example (see `serving.scores`); the answer holds only their sums."""


class StatusQuery(_Body):
    """Ask for the state of a job; None: of the one that has the turn, or had it last."""

    id: str | None = None


class CancelJob(_Body):
    """Stop a job before its next quantum, whether it has the turn or waits for one."""

    id: str


class QuantumStats(_Body):
    """Quanta of one kind since the engine's start."""

    count: NonNegativeInt = 0
    seconds: NonNegativeFloat = 0.0
    launch_s: NonNegativeFloat = 0.0
    """Those seconds in which the host launched them, where the device is not the host's own processor."""
    longest_s: NonNegativeFloat = 0.0


class PreemptionStats(_Body):
    """Counts of requests that arrived while training ran, and the time until training made way for them."""

    arrivals: NonNegativeInt = 0
    """Requests that came to the engine."""
    count: NonNegativeInt = 0
    """Grants of training time that a request cut short, at most one per arrival."""
    p50_s: NonNegativeFloat = 0.0
    p99_s: NonNegativeFloat = 0.0
    longest_s: NonNegativeFloat = 0.0
    """Longest quantum that a request had to wait for; no request waited longer for training."""


class SloStatus(_Body):
    """The latency targets in force, and the governor's margins and counts."""

    ttft_ms: float
    """Milliseconds to the first token, whatever the prompt."""
    ttft_ms_per_token: NonNegativeFloat = 0.0
    """Milliseconds more for each prompt token that is not in the cache; 0 where the site gave `ttft_ms`."""
    tpot_ms: float
    quantile: float
    margin_ttft: float
    """Part of the TTFT target that the governor keeps back, 0 to 1."""
    margin_tpot: float
    """Part of the TPOT target that the governor keeps back, 0 to 1."""
    debt_s: NonNegativeFloat
    """Seconds of training that `share_floor` ran although the targets left no room for it."""
    answered: NonNegativeInt = 0
    """Requests answered since there are targets."""
    met: NonNegativeInt = 0
    """Answered requests that met both targets."""


class CoTrainerStatus(_Body):
    """State of the co-trainer and of the job that a message was about, sent in answer to it."""

    job: str | None = None
    """None where no such job is known."""
    state: JobState = JobState.QUEUED
    error: str = ""
    """Reason why the job failed, or why this engine has no co-training; empty without an error."""
    steps: NonNegativeInt = 0
    examples: NonNegativeInt = 0
    loss_tokens: NonNegativeInt = 0
    loss_sum: float = 0.0
    seconds: NonNegativeFloat = 0.0
    share: NonNegativeFloat = 0.0
    evaluation: Evaluation | None = None
    open_jobs: dict[str, NonNegativeFloat] = Field(default_factory=dict)
    """Jobs with quanta to run → seconds of quanta that each has had."""
    turns: NonNegativeInt = 0
    """Times that another job got the turn, since the engine's start."""
    parked_bytes: NonNegativeInt = 0
    """Memory of what waiting jobs have learnt, out of what is kept for training."""
    quanta: dict[str, QuantumStats] = Field(default_factory=dict)
    """Kind of quantum → its counts since the engine's start."""
    longest_quantum_s: NonNegativeFloat = 0.0
    """Largest P99 of any kind and size of quantum."""
    pieces: dict[str, int] = Field(default_factory=dict)
    """Present sizes of the pieces of a layer, in rows and tokens."""
    slo: SloStatus | None = None
    """None until the engine's own latency is known; until then training runs only in idle time."""
    latency_known: bool = False
    """True once the engine's latency can be predicted."""
    preemption: PreemptionStats = PreemptionStats()
    overlap: NonNegativeFloat = 1.0
    """Seconds by which one second of quanta delays an iteration."""
    streams: dict[str, int] = Field(default_factory=dict)
    """Name of each CUDA stream of SGLang's, and `training` → its priority, the lowest number first; empty on a CPU."""
    hook_calls: dict[Literal["busy", "idle"], NonNegativeInt] = Field(default_factory=dict)
    """Calls of the scheduler's hook while the engine had work, and while it had none."""
    most_quanta_while_waiting: NonNegativeInt = 0
    """Largest number of quanta that one hook call ran while a request waited; the promised bound is 1."""
    shared_tensors: NonNegativeInt = 0
    """Frozen parameters of the trainer that share storage with the engine's."""
    frozen_tensors: NonNegativeInt = 0
    state_bytes: NonNegativeInt = 0
    """LoRA weights, gradients and AdamW's moments."""
    reserved_mb: NonNegativeInt | None = None
    """MiB that are kept for training, as [training].memory_mb says or as chosen; None where nothing bounds it."""
    kv_tokens_given_up: NonNegativeInt = 0
    """Tokens that the KV cache would hold more without it."""
    memory: dict[str, NonNegativeInt] = Field(default_factory=dict)
    """Private bytes of the scheduler process at each stage of building the trainer, in order."""


class CoTrainerClient:
    """The daemon's end of the socket: one answer to each request.

    >>> client = CoTrainerClient(socket_path(run_dir))
    >>> (await client.status()).share
    """

    def __init__(self, socket_path: Path) -> None:
        self._address = f"ipc://{socket_path}"
        self._context = zmq.asyncio.Context.instance()

    async def start(self, job: TrainJob | EvaluateJob) -> CoTrainerStatus:
        """Start a job, which takes turns with others. Raises TrainingError without an answer within REPLY_TIMEOUT_S.

        A co-trainer that cannot train, or has too many jobs, says so in the returned status. One that is known already,
        even if it has ended, is not begun again.
        """
        return await self._ask(job)

    async def status(self, timeout_s: float = REPLY_TIMEOUT_S, job: str | None = None) -> CoTrainerStatus:
        """Ask for the status, and that of a job (None: the one that has the turn, or had it last).

        Raises TrainingError when there is no answer within `timeout_s` seconds.
        """
        return await self._ask(StatusQuery(id=job), timeout_s)

    async def cancel(self, job_id: str) -> CoTrainerStatus:
        """Stop a job before its next quantum; raise TrainingError when there is no answer within REPLY_TIMEOUT_S."""
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
            raise CoTrainerSilent(f"the co-trainer did not answer within {timeout_s:.0f} s") from error
        finally:
            socket.close()
        return wire.unpack_model(payload, CoTrainerStatus)
