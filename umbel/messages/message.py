"""`Message`: the base class of all messages; types that several use; `Failure`, the answer of a site that cannot."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from umbel.printable import Reason

NONCE = r"^([0-9a-f]{64})?$"
"""32 bytes that the centre has used once, in hex, or none."""


class Message(BaseModel):
    """A frozen message without unknown fields."""

    # JSON has no NaN, but a loss can be one: it is written as a string and read back as a number.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""A measured time, in seconds; the centre adds up those of several sites."""
VersionName = Annotated[str, Field(pattern=r"^[a-z0-9_-]{1,40}@v[0-9]{1,9}$")]
"""Name of a version, such as `support@v12`."""


class Failure(Message):
    """A site's answer when it cannot do what was asked."""

    error: Reason
    """`Type: message`, from the site's daemon."""
    final: bool
    """True if asking again will not help."""
