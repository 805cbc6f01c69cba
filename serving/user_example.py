"""`Example`, `ConsentSettings`: what the router and the daemon exchange about users' consented examples."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

SETTINGS = "consent.json"


class ConsentSettings(BaseModel):
    """`consent.json` in the run directory: without it no answer is remembered."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    """Of the HMAC that users are known by, in hex."""
    socket: Path
    """The daemon's control API."""
    models: tuple[str, ...]
    """Names whose live version's answers may be kept."""


class Example(BaseModel):
    """What the daemon is handed: POST /examples."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    user: str = Field(pattern=r"^[0-9a-f]{64}$")
    """HMAC-SHA256 of what the request called its user."""
    messages: list[dict[Literal["role", "content"], str]]
    """The prompt, and then the answer that was accepted, or what it should have been."""
    version: str
    """Which one answered."""
    kind: Literal["accepted", "corrected"]
