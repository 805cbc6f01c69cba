"""`Example`, `ConsentSettings`: messages between SGLang's HTTP process and the daemon about users' examples."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from serving.aliases import BASE_LABEL
from umbel.adapter import AdapterName
from umbel.printable import control

SETTINGS = "consent.json"
"""Name of the file of `ConsentSettings` in the run directory."""


ROLES = ("system", "user", "assistant", "tool")
"""Roles that messages of an example may have."""
MAX_EXAMPLE_BYTES = 64 << 10
"""Largest example: its texts together, in UTF-8."""


class ConsentSettings(BaseModel):
    """Contents of `consent.json`, which the daemon writes; without the file no answer is remembered."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    """Key of the HMAC that makes users' pseudonyms, in hex."""
    socket: Path
    """Unix socket of the daemon's control API for the operator and the engine."""
    models: dict[str, AdapterName]
    """Names of the models whose answers may be kept, each with its adapter: the live versions of adapters."""


class Example(BaseModel):
    """One example that a user accepted or corrected: the body of POST /examples."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    user: str = Field(pattern=r"^[0-9a-f]{64}$")
    """The user's pseudonym: HMAC-SHA256 of the request's `user`, in hex."""
    messages: list[dict[Literal["role", "content"], str]]
    """The prompt, then the accepted answer or its correction."""
    adapter: AdapterName
    """The adapter that was asked for, the only one that this may train."""
    version: str = Field(pattern=rf"^({BASE_LABEL}|[a-z0-9_-]{{1,40}}@v[0-9]{{1,9}})$")
    """The version of it that answered, as `support@v12`; `base` before its first one was promoted."""
    kind: Literal["accepted", "corrected"]
    rejected: str = ""
    """An answer to the same prompt that its user finds worse; empty without one."""

    @model_validator(mode="after")
    def _fit_to_be_judged(self) -> Self:
        if why := unfit(
            [*self.messages, *([{"role": "assistant", "content": self.rejected}] if self.rejected else [])]
        ):
            raise ValueError(why)
        return self

    @model_validator(mode="after")
    def _answered_by_what_was_asked(self) -> Self:
        if self.version != BASE_LABEL and self.version.partition("@")[0] != self.adapter:
            raise ValueError(f"version: {self.version} is no version of {self.adapter}")
        return self


def unfit(messages: Sequence[object]) -> str | None:
    """Say why messages cannot be an example, without quoting them; None if they can.

    An operator judges examples on a terminal, and they are trained on as they are: what a terminal does not show has no
    place in them.
    """
    total = 0
    for message in messages:
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            return "a message is more than a role and a content"
        role, content = message["role"], message["content"]
        if role not in ROLES:
            return f"a role is none of {', '.join(ROLES)}"
        if not isinstance(content, str):
            return "a content is no text"
        if found := control(content):
            return f"a text holds the control character {found}; only tabs and line breaks are kept"
        total += len(content.encode())
    if not messages or total > MAX_EXAMPLE_BYTES:
        return f"its texts have {total} bytes, not 1 to {MAX_EXAMPLE_BYTES} ({MAX_EXAMPLE_BYTES >> 10} KiB)"
    return None
