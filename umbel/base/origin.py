"""`BaseOrigin`: from which base in 16 or 32 bits a packed one was made, and how; the content of its `origin.json`.

Two bases are *kin* where both come from the same weights, with the same config, tokenizer and template: a base in 16
bits, and those packed from it. A packed base without `origin.json` is kin to none.
"""

import operator
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from umbel.base.files import json_object
from umbel.base.fingerprint import BaseFingerprint
from umbel.errors import BaseMismatch, ConfigError

ORIGIN = "origin.json"
SIGNATURE = r"^([0-9a-f]{128})?$"
"""An Ed25519 signature (umbel/signing.py), or none."""
Kin = Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$", exclude_if=operator.not_)]
"""`BaseFingerprint.kin` of the base that others were packed from, or none.

An empty one is not written, so that documents without kin, and their signatures, are those of earlier releases.
"""


def kin_of(base: BaseFingerprint, said: str) -> str:
    """Return the kin of a base, of which `said` is said: one that is not packed has it by its fingerprint."""
    return base.kin if base.dense else said


class BaseOrigin(BaseModel):
    """Made by `umbel base pack`. Without a signature of the centre's it is a claim of whoever wrote it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: BaseFingerprint
    """Fingerprint of the directory that was packed."""
    packed: BaseFingerprint
    """Fingerprint of the directory that came out, where the file lies."""
    recipe: dict[str, str | bool]
    """Such as quant_type nf4 and double_quant true."""
    bitsandbytes: str
    """Release that packed it: another one, or another kind of device, may round a scale to other bytes."""
    signature: str = Field(default="", pattern=SIGNATURE)

    @classmethod
    def parse(cls, model: Path) -> Self | None:
        """Return the content of a directory's `origin.json`, unchecked; None without one. Raises ConfigError."""
        file = model / ORIGIN
        if not file.is_file():
            return None
        json_object(file)  # says what it is instead
        try:
            return cls.model_validate_json(file.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise ConfigError(f"{file}: {where}: {first['msg']}; copy the packed directory again") from error

    @classmethod
    def read(cls, model: Path, packed: BaseFingerprint) -> Self | None:
        """Return the origin of a directory with that fingerprint; None without an `origin.json`.

        Raises ConfigError for a file that is none, BaseMismatch for one of another directory.
        """
        file, origin = model / ORIGIN, cls.parse(model)
        if origin is None:
            return None
        remedy = f"copy {ORIGIN} of this very directory again, or remove the file"
        packed.require_same(origin.packed, here=str(model), there=str(file), remedy=remedy)
        differing = [
            part for part in ("config", "tokenizer", "chat_template")
            if getattr(origin.base, part) != getattr(packed, part)
        ]  # fmt: skip
        if differing:
            raise BaseMismatch(f"{file}: {', '.join(differing)} of the base that was packed differ; {remedy}")
        if not origin.base.dense:
            raise BaseMismatch(f"{file}: the base that was packed was packed already; {remedy}")
        return origin

    @property
    def kin(self) -> str:
        """Return what every base that is kin to this one has in common."""
        return self.base.kin
