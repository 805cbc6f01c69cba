"""`pack`, `unpack`: msgpack messages between umbel's own processes (daemon and co-trainer, and inside Flower records).

Every message is a map `{"schema": 1, "kind": …, **body}`. Nothing is ever unpickled.

    payload = pack("Progress", {"steps": 3})
    kind, body = unpack(payload)                 # ("Progress", {"steps": 3})
    order = unpack_model(pack_model(order), RoundOrder)   # the same for pydantic models, by their class name
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import msgpack
from pydantic import BaseModel, ValidationError

from umbel.errors import WireError

M = TypeVar("M", bound=BaseModel)

SCHEMA = 1
MAX_BYTES = 1 << 20
"""Largest message. Adapters travel as files or Flower arrays, so a message is small."""


def repeated_key(pairs: Sequence[tuple[str, Any]]) -> str | None:
    """Return the first key that is there twice among the (key, value) pairs of a JSON object; None without one."""
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            return key
        seen.add(key)
    return None


def pack(kind: str, body: dict[str, Any]) -> bytes:
    """Encode one message; raise WireError for one over MAX_BYTES.

    >>> unpack(pack("Progress", {"steps": 3}))
    ('Progress', {'steps': 3})
    """
    payload: bytes = msgpack.packb({"schema": SCHEMA, "kind": kind, **body})
    if len(payload) > MAX_BYTES:
        raise WireError(f"{kind}: {len(payload)} bytes is over the limit of {MAX_BYTES}")
    return payload


def unpack(payload: bytes) -> tuple[str, dict[str, Any]]:
    """Decode one message into its kind and body; raise WireError for anything else."""
    if len(payload) > MAX_BYTES:
        raise WireError(f"message of {len(payload)} bytes is over the limit of {MAX_BYTES}")
    try:
        body = msgpack.unpackb(payload)
    except (ValueError, msgpack.UnpackException) as error:
        raise WireError(f"not a msgpack message ({error})") from error
    if not isinstance(body, dict) or not isinstance(body.get("kind"), str):
        raise WireError("not an umbel message: expected a map with 'schema' and 'kind'")
    if body.pop("schema", None) != SCHEMA:
        raise WireError(f"{body['kind']}: other schema than {SCHEMA}; run the same umbel release on both sides")
    return body.pop("kind"), body


def pack_model(model: BaseModel) -> bytes:
    """Encode a pydantic model under its class name; raise WireError for one over MAX_BYTES."""
    return pack(type(model).__name__, model.model_dump(mode="json"))


def unpack_model(payload: bytes, model: type[M]) -> M:
    """Decode and validate a message of `pack_model`; raise WireError, with the field, for anything else."""
    kind, body = unpack(payload)
    if kind != model.__name__:
        raise WireError(f"expected a {model.__name__}, got a {kind}")
    try:
        return model.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise WireError(f"{kind}: {where}: {first['msg']}") from error
