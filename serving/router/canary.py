"""Who is answered by the shadow while it is watched: a share of the users, and each of them always.

A user's place in 0..1 is a hash of the adapter's name and of what tells users apart. The version is left out of it on
purpose: the same users go first with every new version, and none of them is sent back and forth.
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from serving.aliases import AliasTable
from umbel.adapter import AdapterRef

USER_FIELDS = ("safety_identifier", "user")
USER_HEADER = b"x-umbel-user"


def version_for(
    table: AliasTable, model: str, request: Mapping[str, Any], headers: Iterable[tuple[bytes, bytes]]
) -> AdapterRef | None:
    """What answers this request: a version, or None for the base. Raises NotFound as `AliasTable.resolve`.

    Only who asks for an adapter by its plain name can be in its canary: `support@live` and `support@v12` are choices.
    """
    ref = table.resolve(model)
    share = table.canary.get(model, 0.0)
    if not share:
        return ref
    user = user_of(request, headers)
    return table.shadow(model) if user is not None and place(model, user) < share else ref


def user_of(request: Mapping[str, Any], headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """What tells this user from others: the body's field, the header, or how the conversation began."""
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
    """Where a user stands in 0..1; the same for every version of an adapter."""
    digest = hashlib.sha256(f"{adapter}\0{user}".encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
