"""`HelloQuery`, `Hello`: the question who a site is, and its answer, which is about one adapter only.

Federations that share a site hear nothing of each other from it.
"""

import operator
from typing import Annotated, Literal

from pydantic import Field
from pydantic.types import NonNegativeInt, PositiveInt

from umbel.adapter import AdapterName
from umbel.base.fingerprint import BaseFingerprint
from umbel.base.origin import SIGNATURE, Kin
from umbel.base.packed import Packing
from umbel.messages.message import NONCE, Message, VersionName

Module = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+){0,15}$", max_length=200)]
"""Path of a module in the base, such as `model.layers.0.self_attn.q_proj`."""
Width = Annotated[int, Field(ge=1, le=1 << 20)]
"""Width of a linear layer; bounded, as the centre makes the first adapter from the widths that sites report."""


class HelloQuery(Message):
    """Flower's `query.hello`. Answered by a Hello."""

    adapter: AdapterName
    """The adapter of the centre that asks."""
    nonce: str = Field(default="", pattern=NONCE)
    """New for each question; the answer is signed for it."""


class Hello(Message):
    """A site's description of itself, as far as one adapter goes: GET /hello."""

    site: str
    adapter: AdapterName | None
    """The adapter that was asked about; None where this site does not train it."""
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
    """Largest rank that the adapter may have here."""
    train_examples: NonNegativeInt = 0
    """Examples of the adapter's own data."""
    eval_examples: NonNegativeInt = 0
    data_changes: NonNegativeInt = 0
    """Times that the site has taken other examples in use since its daemon began."""
    live: VersionName | None = None
    """The version that answers users; None while the base does."""
    refused: tuple[VersionName, ...] = ()
    """Versions that this site rejected, or that were rolled back here: the newest 20, newest first."""
    signature: str = Field(default="", pattern=SIGNATURE)
    """Of a HelloStatement for the nonce that was asked with; empty without one, and where the site has no key."""
