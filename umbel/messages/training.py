"""The messages of a round's training.

A round of the centre is an order (`RoundOrder`) on its way, and a job (`JobState`) at the site.
"""

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.types import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from umbel.adapter import AdapterName, Personal
from umbel.base.origin import SIGNATURE, Kin
from umbel.messages.message import NONCE, Message, Seconds, VersionName
from umbel.printable import Reason

RoundKey = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,80}$")]
"""`<lineage>-<round>-<parent>`: the registry's id, the round, and the version that it trains from."""


class TrainPlan(Message):
    """The settings of one round of training.

    A site stops at `steps` or after `seconds`, whichever comes first; sooner, where it finds that more brings nothing.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    rank: PositiveInt
    """Rank of the shared part, which sites receive and send."""
    steps: PositiveInt
    """Optimizer steps, at most."""
    seconds: PositiveFloat
    """Wall-clock budget at the site; the update consists of the steps that were applied by then."""
    batch_size: PositiveInt = 8
    """Examples per optimizer step; the site cuts them into its own micro-batches."""
    learning_rate: PositiveFloat = 1e-3
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: NonNegativeInt = 0
    weight_decay: NonNegativeFloat = 0.0
    clip_norm: PositiveFloat = 1.0
    factors: Literal["AB", "A", "B"] = "AB"
    """Factors that are trained; another one keeps the parent's values (FFA-LoRA, RoLoRA)."""
    proximal: NonNegativeFloat = 0.0
    """FedProx's μ (arXiv 1812.06127, equation 2): adds the gradient of μ/2 · ‖w − w_parent‖² over trained factors."""
    seed: NonNegativeInt = 0
    """Seed of the order of the data; the strategy adds the round to it."""
    personal: Personal | None = None
    """The part that stays at the site and is trained together with the shared one; None for strategies without one."""

    @property
    def joined_rank(self) -> int:
        """Rank of the adapter that is trained: the shared rank and the personal one."""
        return self.rank + (self.personal.rank if self.personal else 0)


class RoundOrder(Message):
    """Order to start one round of training, or to find it again: POST /adapters/{name}/rounds/{key}."""

    key: RoundKey
    base: str
    """Digest of the base fingerprint; a site with another base refuses, unless its base is of the order's `kin`."""
    kin: Kin = ""
    """Kin of the bases that take part; empty but in runs with `mixed-bases`."""
    parent: str
    """Digest of the adapter to continue from; its bytes travel beside this order."""
    round: NonNegativeInt
    plan: TrainPlan
    run: str = ""
    """Digest of the run's training settings; a run that continues an interrupted one has the same."""
    nonce: str = Field(default="", pattern=NONCE)
    """Unique to this order, made by the centre; the same whenever the order is sent again."""


class JobState(StrEnum):
    """The state of a round's job at a site."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    SKIPPED = "skipped"  # the site found nothing that is worth training; no failure, and no update
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        """True for a state that never changes again."""
        return self not in (JobState.QUEUED, JobState.RUNNING)


class RoundReport(Message):
    """State and result of a round at a site: GET /adapters/{name}/rounds/{key}."""

    key: RoundKey
    state: JobState
    parent: str
    steps: NonNegativeInt = 0
    num_examples: NonNegativeInt = 0
    """Examples trained on in this round, repetitions counted."""
    num_loss_tokens: NonNegativeInt = 0
    loss_sum: float = 0.0
    """Sum of the training loss over those tokens (nats)."""
    held_examples: NonNegativeInt = 0
    """Distinct examples to train on here; the centre weighs by them, or by their `held_loss_tokens`."""
    held_loss_tokens: NonNegativeInt = 0
    seconds: Seconds = 0.0
    """From the first quantum to the last."""
    share: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Fraction of those seconds spent in quanta."""
    update: str | None = None
    """Digest of the trained adapter, once done."""
    rank: PositiveInt | None = None
    error: Reason = ""
    """Reason of a round that failed, was cancelled or skipped."""
    signature: str = Field(default="", pattern=SIGNATURE)
    """Of an UpdateStatement (umbel/statements.py), of a round that is done or skipped; empty before, and where the
    site has no key."""
    live: VersionName | None = None
    """The version that answers users now, which the signature leaves out; None while the base does."""


class Submit(Message):
    """Flower's `train.submit`: start a round; the parent adapter travels beside it. Answered by a RoundReport."""

    adapter: AdapterName
    order: RoundOrder
    signature: str = Field(default="", pattern=SIGNATURE)
    """The centre's signature of adapter and order; empty where it does not sign."""
    fetch: bool = False
    """True to send the update along, if the round ends while the site holds the question; not signed."""


class RoundQuery(Message):
    """Flower's `query.collect` of a round. Answered by a RoundReport."""

    adapter: AdapterName
    key: RoundKey
    fetch: bool = False
    """True to send the update along, if the round is done. Without it answers are small, so asking often is cheap."""
