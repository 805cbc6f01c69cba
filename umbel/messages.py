"""The messages between centre and site: bodies of Flower messages and of the site's control API.

Both ends use these definitions. Every count is a sum, so that the centre can add up sites without trusting their means.
A round of the centre is an order (`RoundOrder`) on its way, and a job (`JobState`) at the site.
"""

import operator
from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.types import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from umbel.adapter import AdapterManifest, AdapterName, Lifecycle, Personal
from umbel.base.fingerprint import BaseFingerprint
from umbel.base.origin import SIGNATURE, Kin
from umbel.base.packed import Packing
from umbel.printable import Reason

NONCE = r"^([0-9a-f]{64})?$"
"""32 bytes that the centre has used once, in hex, or none."""


class Message(BaseModel):
    """A frozen message without unknown fields."""

    # JSON has no NaN, but a loss can be one: it is written as a string and read back as a number.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""A measured time, in seconds; the centre adds up those of several sites."""
RoundKey = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,80}$")]
"""`<lineage>-<round>-<parent>`: the registry's id, the round, and the version that it trains from."""
VersionName = Annotated[str, Field(pattern=r"^[a-z0-9_-]{1,40}@v[0-9]{1,9}$")]
"""Name of a version, such as `support@v12`."""
Module = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+){0,15}$", max_length=200)]
"""Path of a module in the base, such as `model.layers.0.self_attn.q_proj`."""
Width = Annotated[int, Field(ge=1, le=1 << 20)]
"""Width of a linear layer; bounded, as the centre makes the first adapter from the widths that sites report."""


class TrainPlan(Message):
    """The settings of one round of training. A site stops at `steps` or after `seconds`, whichever comes first."""

    model_config = ConfigDict(allow_inf_nan=False)

    rank: PositiveInt
    """Rank of the shared part, which sites receive and send."""
    steps: PositiveInt
    """Optimizer steps."""
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
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        """True for a state that never changes again."""
        return self in (JobState.DONE, JobState.FAILED, JobState.CANCELLED)


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
    signature: str = Field(default="", pattern=SIGNATURE)
    """Of an UpdateStatement (umbel/statements.py); empty while there is no update, and where the site has no key."""


class Evaluation(Message):
    """Measurement of an adapter, or of the base, on a site's held-out examples, as sums."""

    loss_sum: float
    """Nats."""
    loss_tokens: NonNegativeInt
    exact: NonNegativeInt
    """Examples of which every answer token is the arg max, as in greedy decoding."""
    examples: NonNegativeInt

    @property
    def loss(self) -> float:
        """Mean loss per token (nats); NaN without tokens."""
        return self.loss_sum / self.loss_tokens if self.loss_tokens else float("nan")

    @property
    def exact_match(self) -> float:
        """Share of examples that are exact; NaN without examples."""
        return self.exact / self.examples if self.examples else float("nan")


Decision = Literal["promote", "keep", "reject"]
"""A site's decision on a shadow. promote: better than the incumbent; keep: not shown to be better; reject: worse."""


class Verdict(Message):
    """A site's judgement of a shadow, and its reasons."""

    accepted: bool
    """True if the site is in favour of promoting it; a quorum counts these."""
    reasons: tuple[Reason, ...]
    decision: Decision = Field(default_factory=lambda known: "promote" if known.get("accepted") else "reject")

    @model_validator(mode="after")
    def _one_meaning(self) -> Self:
        if self.accepted != (self.decision == "promote"):
            raise ValueError(f"accepted = {self.accepted}, and yet the decision is {self.decision!r}")
        return self


class ShadowReport(Message):
    """State of a pushed version at a site: POST /adapters/{name}/shadow and GET /adapters/{ref}/shadow."""

    ref: VersionName
    state: Lifecycle
    """The version's state at the site; the site's journal keeps no other."""
    probe: dict[str, Evaluation] = Field(default_factory=dict)
    """"base", "live" (absent while the base answers users) and "shadow" on the same held-out set."""
    verdict: Verdict | None = None
    load_s: Seconds = 0.0
    probe_s: Seconds = 0.0
    watch_s: Seconds = 0.0
    taken_back: Reason = ""
    """The reason for which the site rolled it back automatically; empty if it did not."""
    signature: str = Field(default="", pattern=SIGNATURE)
    """Of a VerdictStatement for the nonce that was asked with; empty without one, and where the site has no key."""


class HelloQuery(Message):
    """Flower's `query.hello`. Answered by a Hello."""

    nonce: str = Field(default="", pattern=NONCE)
    """New for each question; the answer is signed for it."""


class Hello(Message):
    """A site's description of itself: GET /hello."""

    site: str
    adapters: tuple[AdapterName, ...]
    fingerprint: BaseFingerprint
    kin: Kin = ""
    """What bases of one origin have in common; empty where a packed base says no origin that this site trusts."""
    packing: Packing = Field(default="", exclude_if=operator.not_)
    """What the base's linear layers are packed in; empty for a base that is not packed."""
    shapes: dict[Module, tuple[Width, Width]] = Field(min_length=1)
    """Module path → (out, in) of every linear layer that is adapted here."""
    dtype: Literal["float32", "bfloat16", "float16"]
    """Dtype of the engine's weights, to which the site rounds the adapters that it loads."""
    max_lora_rank: PositiveInt
    train_examples: NonNegativeInt
    eval_examples: NonNegativeInt
    live: dict[AdapterName, VersionName | None]
    """Adapter → the version that answers users; None while the base does."""
    refused: dict[AdapterName, tuple[VersionName, ...]] = Field(default_factory=dict)
    """Adapter → versions that this site rejected, or that were rolled back here: the newest 20, newest first."""
    signature: str = Field(default="", pattern=SIGNATURE)
    """Of a HelloStatement for the nonce that was asked with; empty without one, and where the site has no key."""


class Submit(Message):
    """Flower's `train.submit`: start a round; the parent adapter travels beside it. Answered by a RoundReport."""

    adapter: AdapterName
    order: RoundOrder
    signature: str = Field(default="", pattern=SIGNATURE)
    """The centre's signature of adapter and order; empty where it does not sign."""


class Shadow(Message):
    """Flower's `query.shadow`: load and measure a version; its weights travel beside it. Answered by a ShadowReport."""

    manifest: AdapterManifest
    signature: str = Field(default="", pattern=SIGNATURE)
    """The centre's signature of this manifest (umbel/signing.py); empty where it does not sign."""
    nonce: str = Field(default="", pattern=NONCE)
    """New for each question about a verdict; the report is signed for it."""


class RoundQuery(Message):
    """Flower's `query.collect` of a round. Answered by a RoundReport."""

    adapter: AdapterName
    key: RoundKey
    fetch: bool = False
    """True to send the update along, if the round is done. Without it answers are small, so asking often is cheap."""


class VersionQuery(Message):
    """Flower's `query.collect` of a shadow, `query.promote` and `query.discard`. Answered by a ShadowReport."""

    ref: str
    nonce: str = Field(default="", pattern=NONCE)
    """As in the `Shadow` whose verdict is waited for; the report is signed for it."""


class AdapterQuery(Message):
    """Flower's `query.rollback`. Answered by a LiveVersion."""

    adapter: AdapterName
    instead_of: str | None = None
    """Roll back only if this version is live, so that a repeated message rolls back once. None: any version."""


class Restore(Message):
    """Flower's `query.restore`: the version that is live in the federation. Answered by a Restored."""

    adapter: AdapterName
    ref: str | None
    """The version; None for the base."""


class Restored(Message):
    """Answer to a Restore."""

    live: VersionName | None
    """The version that answers users now; None while the base does."""
    state: Lifecycle | None
    """State of the asked version at the site; None for the base, and when the weights must be sent first."""


class LiveVersion(Message):
    """The version that answers users after a roll back; None for the base."""

    live: VersionName | None


class Failure(Message):
    """A site's answer when it cannot do what was asked."""

    error: Reason
    """`Type: message`, from the site's daemon."""
    final: bool
    """True if asking again will not help."""
