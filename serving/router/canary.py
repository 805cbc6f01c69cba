"""`version_for`: choose the version of a request; while a shadow is watched, it answers a fixed share of the users.

A user's place in 0..1 is a hash of the adapter's name and of the user's id. The version is left out on purpose: the
same users go first with every new version, and no user is sent back and forth between two versions.
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from serving.aliases import AliasTable
from umbel.adapter import AdapterRef

USER_FIELDS = ("safety_identifier", "user")
"""Fields of a body that identify its user; the first one that is set counts."""
USER_HEADER = b"x-umbel-user"


def version_for(
    table: AliasTable, model: str, request: Mapping[str, Any], headers: Iterable[tuple[bytes, bytes]]
) -> AdapterRef | None:
    """Return the version that answers this request; None is the base. Raises NotFound as `AliasTable.resolve` does.

    Only a request for an adapter's plain name can be in its canary: `support@live` and `support@v12` ask for a version.
    """
    ref = table.resolve(model)
    share = table.canary.get(model, 0.0)
    if not share:
        return ref
    user = user_of(request, headers)
    return table.shadow(model) if user is not None and place(model, user) < share else ref


def user_of(request: Mapping[str, Any], headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """Return an id of the user: a field of the body, the header, or else the first thing said in the conversation.

    None if there is none of these.
    """
    for field in USER_FIELDS:
        if isinstance(request.get(field), str) and request[field]:
            return str(request[field])
    named = dict(headers).get(USER_HEADER)
    if named:
        return named.decode("latin-1")
    # The messages of a chat, or the items of a response; a plain completion is no conversation.
    turns = request.get("messages", request.get("input"))
    if isinstance(turns, list):
        said = (turn.get("content") for turn in turns if isinstance(turn, dict) and turn.get("role") == "user")
        turns = next(said, None)
    return repr(turns) if turns else None


def place(adapter: str, user: str) -> float:
    """Return a user's place in 0..1, which is the same for every version of an adapter."""
    digest = hashlib.sha256(f"{adapter}\0{user}".encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
