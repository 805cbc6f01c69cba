"""The messages about versions: measure one beside the live one, make it live, take it back."""

import operator
from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic.types import NonNegativeInt

from umbel.adapter import AdapterManifest, AdapterName, Lifecycle
from umbel.base.origin import SIGNATURE
from umbel.messages.message import NONCE, Message, Seconds, VersionName
from umbel.printable import Reason


class Evaluation(Message):
    """Measurement of an adapter, or of the base, on a site's held-out examples, as sums."""

    loss_sum: float
    """Nats. Of a pair of answers the loss is −log σ(log π(chosen) − log π(rejected))."""
    loss_tokens: NonNegativeInt
    """Tokens of answers, or pairs."""
    exact: NonNegativeInt
    """Examples of which every answer token is the arg max, as in greedy decoding; or pairs in which the chosen answer
    is more likely than the rejected one."""
    examples: NonNegativeInt
    pairs: bool = Field(default=False, exclude_if=operator.not_)
    """True if the examples are pairs of answers; then `exact_match` is the preference accuracy."""

    @property
    def loss(self) -> float:
        """Mean loss per token, or per pair (nats); NaN without any."""
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


class Shadow(Message):
    """Flower's `query.shadow`: load and measure a version; its weights travel beside it. Answered by a ShadowReport."""

    manifest: AdapterManifest
    signature: str = Field(default="", pattern=SIGNATURE)
    """The centre's signature of this manifest (umbel/signing.py); empty where it does not sign."""
    nonce: str = Field(default="", pattern=NONCE)
    """New for each question about a verdict; the report is signed for it."""


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
