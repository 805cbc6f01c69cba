"""`Example`, `ConsentSettings`: messages between SGLang's HTTP process and the daemon about users' examples."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

SETTINGS = "consent.json"
"""Name of the file of `ConsentSettings` in the run directory."""


class ConsentSettings(BaseModel):
    """Contents of `consent.json`, which the daemon writes; without the file no answer is remembered."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    """Key of the HMAC that makes users' pseudonyms, in hex."""
    socket: Path
    """Unix socket of the daemon's control API."""
    models: tuple[str, ...]
    """Names of the models whose answers may be kept: the live versions of adapters."""


class Example(BaseModel):
    """One example that a user accepted or corrected: the body of POST /examples."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    user: str = Field(pattern=r"^[0-9a-f]{64}$")
    """The user's pseudonym: HMAC-SHA256 of the request's `user`, in hex."""
    messages: list[dict[Literal["role", "content"], str]]
    """The prompt, then the accepted answer or its correction."""
    version: str
    """The version that answered, as `support@v12`."""
    kind: Literal["accepted", "corrected"]
