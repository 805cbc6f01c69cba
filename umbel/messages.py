"""What the centre and a site say to each other: the bodies of Flower messages and of the site's control API.

One definition for both ends. Every count is a sum, so that the centre can add sites up without trusting a mean.
"""

from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from umbel.adapter import AdapterManifest, AdapterName, Personal
from umbel.base import BaseFingerprint

SIGNATURE = r"^([0-9a-f]{128})?$"
"""An Ed25519 signature (umbel/signing.py), or none."""


class _Message(BaseModel):
    # JSON has no NaN; a loss may be one, and must survive being written down.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""A measured time; the centre adds them up."""
RoundKey = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,80}$")]
"""`<lineage>-<round>-<parent>`: the registry, this round of it, and the version it trains from."""
Module = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+){0,15}$", max_length=200)]
Width = Annotated[int, Field(ge=1, le=1 << 20)]
"""Of a linear layer. What a site says of its layers is what the first adapter is made of."""


class TrainPlan(_Message):
    """What one round of training is. A site stops at `steps` or after `seconds`, whichever comes first."""

    model_config = ConfigDict(allow_inf_nan=False)

    rank: PositiveInt
    """Of what the sites share, receive and send."""
    steps: PositiveInt
    """Optimizer steps."""
    seconds: PositiveFloat
    """Wall-clock budget at the site; what was applied by then is the update."""
    batch_size: PositiveInt = 8
    """Examples per optimizer step; the site cuts them into its own micro-batches."""
    learning_rate: PositiveFloat = 1e-3
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: NonNegativeInt = 0
    weight_decay: NonNegativeFloat = 0.0
    clip_norm: PositiveFloat = 1.0
    factors: Literal["AB", "A", "B"] = "AB"
    """Which of the two factors are trained; the other stays as the parent has it (FFA-LoRA, RoLoRA)."""
    proximal: NonNegativeFloat = 0.0
    """FedProx's μ: the gradient of μ/2 · ‖w − w_parent‖² over the trained factors is added."""
    seed: NonNegativeInt = 0
    """Of the order of the data; the round is added to it."""
    personal: Personal | None = None
    """What stays at the site, joined to what it receives and trained with it; None: nothing."""

    @property
    def joined_rank(self) -> int:
        """Rank of what is trained."""
        return self.rank + (self.personal.rank if self.personal else 0)


class RoundOrder(_Message):
    """Start (or find again) one round of training: POST /adapters/{name}/rounds/{key}."""

    key: RoundKey
    base: str
    """Digest of the base fingerprint; a site with another base refuses."""
    parent: str
    """Digest of the adapter to continue from; its bytes travel beside this order."""
    round: NonNegativeInt
    plan: TrainPlan
    run: str = ""
    """Digest of what the run was asked to train; one that goes on where another was interrupted has the same."""
    nonce: str = Field(default="", pattern=r"^([0-9a-f]{64})?$")
    """The centre's, of this order and no other, and the same whenever the order is sent again."""


class JobState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        return self in (JobState.DONE, JobState.FAILED, JobState.CANCELLED)


class RoundReport(_Message):
    """How a round stands at a site: GET /adapters/{name}/rounds/{key}."""

    key: str
    state: JobState
    parent: str
    steps: NonNegativeInt = 0
    num_examples: NonNegativeInt = 0
    """Examples trained on in this round, repetitions counted."""
    num_loss_tokens: NonNegativeInt = 0
    """Tokens that carried a loss; what an update weighs."""
    loss_sum: float = 0.0
    """Sum of the training loss over those tokens (nats)."""
    seconds: Seconds = 0.0
    """From the first quantum to the last."""
    share: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Fraction of those seconds spent in quanta."""
    update: str | None = None
    """Digest of the trained adapter, once done."""
    rank: PositiveInt | None = None
    error: str = ""
    signature: str = Field(default="", pattern=SIGNATURE)
    """Of an UpdateStatement, by the site; empty while there is no update, and where the site has no key."""


class UpdateStatement(_Message):
    """What a site signs of an update (umbel/signing.py). It never travels: both ends put it together."""

    site: str
    order: RoundOrder
    """What was trained: run, round, parent, base, plan and nonce."""
    report: RoundReport
    """What came of it: the update's digest, and the counts. Without a signature."""

    @classmethod
    def of(cls, site: str, order: RoundOrder, report: RoundReport) -> Self:
        return cls(site=site, order=order, report=report.model_copy(update={"signature": ""}))


class Evaluation(_Message):
    """An adapter (or the base) on a site's held-out set, as sums."""

    loss_sum: float
    loss_tokens: NonNegativeInt
    exact: NonNegativeInt
    """Examples whose every answer token is the arg max, as greedy decoding would give it."""
    examples: NonNegativeInt

    @property
    def loss(self) -> float:
        """Mean loss per token (nats)."""
        return self.loss_sum / self.loss_tokens if self.loss_tokens else float("nan")

    @property
    def exact_match(self) -> float:
        return self.exact / self.examples if self.examples else float("nan")


class ShadowState(StrEnum):
    VALIDATING = "validating"
    PROBING = "probing"
    WATCHING = "watching"  # it answers a share of the users, or is given requests of the live version once more
    JUDGED = "judged"
    LIVE = "live"
    RETIRED = "retired"
    REJECTED = "rejected"


Decision = Literal["promote", "keep", "reject"]
"""Of a site on a shadow: better than what answers users now; not shown to be, so that it stays a shadow; or worse."""


class Verdict(_Message):
    """A site's judgement of a shadow, with its reasons."""

    accepted: bool
    """Whether the site is in favour of promoting it; what a quorum counts."""
    reasons: tuple[str, ...]
    decision: Decision = Field(default_factory=lambda known: "promote" if known.get("accepted") else "reject")

    @model_validator(mode="after")
    def _one_meaning(self) -> Self:
        if self.accepted != (self.decision == "promote"):
            raise ValueError(f"accepted = {self.accepted}, and yet the decision is {self.decision!r}")
        return self


class ShadowReport(_Message):
    """How a pushed version stands at a site: POST /adapters/{name}/shadow and GET /adapters/{ref}."""

    ref: str
    state: ShadowState
    probe: dict[str, Evaluation] = Field(default_factory=dict)
    """"base", "live" (absent while the base answers users) and "shadow" on the same held-out set."""
    verdict: Verdict | None = None
    load_s: Seconds = 0.0
    probe_s: Seconds = 0.0
    watch_s: Seconds = 0.0
    taken_back: str = ""
    """Why the site has rolled it back by itself."""


class Hello(_Message):
    """What a site says of itself: GET /hello."""

    site: str
    adapters: tuple[str, ...]
    fingerprint: BaseFingerprint
    shapes: dict[Module, tuple[Width, Width]] = Field(min_length=1)
    """Module path → (out, in) of every linear layer that is adapted here."""
    dtype: Literal["float32", "bfloat16", "float16"]
    """In which the engine serves, and expects adapters."""
    max_lora_rank: PositiveInt
    train_examples: NonNegativeInt
    eval_examples: NonNegativeInt
    live: dict[str, str | None]
    """Adapter → the version that answers users; None while the base does."""
    refused: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Adapter → versions that this site rejected or went back from by itself, the newest 20, newest first."""


class Submit(_Message):
    """Flower's `train.submit`: start a round; the parent adapter travels beside it. Answered by a RoundReport."""

    adapter: AdapterName
    order: RoundOrder
    signature: str = Field(default="", pattern=SIGNATURE)
    """Of adapter and order, by the centre; empty where it does not sign."""


class Shadow(_Message):
    """Flower's `query.shadow`: load and measure a version; its weights travel beside it. Answered by a ShadowReport."""

    manifest: AdapterManifest
    signature: str = Field(default="", pattern=SIGNATURE)
    """Of this manifest, by the centre (umbel/signing.py); empty where it does not sign."""


class RoundQuery(_Message):
    """Flower's `query.collect` of a round. Answered by a RoundReport."""

    adapter: AdapterName
    key: RoundKey
    fetch: bool = False
    """Send the update along, if the round is done. Without it an answer is small, whoever asks how often."""


class VersionQuery(_Message):
    """Flower's `query.collect` of a shadow, `query.promote` and `query.discard`. Answered by a ShadowReport."""

    ref: str


class AdapterQuery(_Message):
    """Flower's `query.rollback`. Answered by a LiveVersion."""

    adapter: AdapterName
    instead_of: str | None = None
    """Only if this version answers users: sent twice, it goes back once. None: whatever answers."""


class Restore(_Message):
    """Flower's `query.restore`: what the federation says answers users. Answered by a Restored."""

    adapter: AdapterName
    ref: str | None
    """The version; None for the base."""


class Restored(_Message):
    """How far a site followed a Restore."""

    live: str | None
    """What answers users now; None while the base does."""
    state: ShadowState | None
    """How the version stands there: LIVE when it answers; None when its weights have to be sent first."""


class LiveVersion(_Message):
    """What answers users after a roll back; None while the base does."""

    live: str | None


class Failure(_Message):
    """A site's answer when it cannot do what was asked."""

    error: str
    """`Type: message`, as the site's daemon said it."""
    final: bool
    """Asking again will not help."""
