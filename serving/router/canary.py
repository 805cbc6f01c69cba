"""`version_for`: choose the version of a request, which is another one for a share of the users while two are compared.

While a shadow is watched it answers a share of the users, the canary. In a roll-back window the version before still
answers a share of them, the control. A user's place in 0..1 is a hash of the adapter's name and of the user's id. The
canary are those from 0 on, the control those up to 1, so that nobody who met a version in its canary goes back in its
control. The version is left out of the hash on purpose: the same users go first with every version; with
`redraw_users` it is in the hash, and each version has its own. No user is sent back and forth between two versions.
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from serving.aliases import AliasTable
from umbel.adapter import EngineRef

USER_FIELDS = ("safety_identifier", "user")
"""Fields of a body that identify its user; the first one that is set counts."""
USER_HEADER = b"x-umbel-user"


def version_for(table: AliasTable, model: str, user: str | None) -> EngineRef | None:
    """Return the version or served adapter that answers this request; None is the base.

    Raises NotFound as `AliasTable.resolve` does.

    Only a request for an adapter's plain name can be in its canary or control: `support@live` and `support@v12` ask for
    a version. One of no `user` is in neither.
    """
    ref = table.resolve(model)
    if user is None:
        return ref
    canary, control = table.canary.get(model, 0.0), table.control.get(model, 0.0)
    if canary and _place(table, model, user, table.shadow(model)) < canary:
        return table.shadow(model)
    if control and _place(table, model, user, ref) >= 1 - control:
        return table.previous(model)
    return ref


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
    """Return a user's place in 0..1 among those of `adapter`: its name, or its version where users are drawn anew."""
    digest = hashlib.sha256(f"{adapter}\0{user}".encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _place(table: AliasTable, model: str, user: str, candidate: EngineRef | None) -> float:
    return place(str(candidate) if table.redraw_users else model, user)
