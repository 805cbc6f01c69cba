"""`turns_of`: the turns in a list of messages, in OpenAI's form or ShareGPT's; and how fields of an example are read.

No message of this module holds text of an example.
"""

import difflib
import json
from collections.abc import Collection, Mapping
from typing import Any

from client.data.conversation import Turn
from client.data.tool_fields import tool_calls_of
from umbel.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""ShareGPT's `from` → role."""
NEUTRAL = frozenset([
    "_id", "id", "uid", "uuid", "idx", "index", "hash", "source", "src", "dataset", "origin", "category", "topic",
    "subject", "domain", "task", "task_type", "type", "tag", "tags", "lang", "language", "split", "date", "time",
    "timestamp", "created", "created_at", "updated", "updated_at", "author", "user_id", "url", "link", "license",
    "licence", "version", "model", "score", "rating", "quality", "difficulty", "comment", "comments", "note",
    "notes", "meta", "metadata", "info", "conversation_id", "thread_id", "session_id", "request_id", "file",
    "filename", "path", "page", "row", "line", "number", "prompt_id", "score_chosen", "score_rejected",
])  # fmt: skip
"""Fields without a part in training, of an example or of a message."""
Labelled = tuple[str, Turn]
"""(place in the example, as `messages[2]`; the turn)."""


def turns_of(messages: object, field: str, where: str) -> list[Labelled]:
    """Return the turns in a list of messages, with their places; raise DataError, naming the place, for anything else.

    A message with `from` instead of `role` is in ShareGPT's form.
    """
    if not isinstance(messages, list) or not messages:
        raise DataError(f'{where}: "{field}" is {kind_of(messages)}; expected a list of messages')
    turns = []
    for index, message in enumerate(messages):
        label = f"{field}[{index}]"
        if not isinstance(message, dict):
            raise DataError(f"{where}: {label}: expected an object, not {kind_of(message)}")
        spoken = "from" in message and "role" not in message
        turns.append((label, (_spoken if spoken else _message)(message, f"{where}: {label}")))
    return turns


def _spoken(message: Mapping[str, Any], where: str) -> Turn:
    """Return a turn in ShareGPT's form: `from` and `value`."""
    given = {field: value for field, value in message.items() if value is not None}
    refuse_unknown(given, ("from", "value", "weight"), where)
    speaker = text_of(given, "from", where)
    if speaker not in SPEAKERS:
        raise DataError(
            f"{where}: {_quoted(speaker)} is no known speaker; known: {', '.join(SPEAKERS)}; write calls of tools and "
            'their results as "messages"'
        )
    return Turn(SPEAKERS[speaker], text_of(given, "value", where), trained=_weight(given, where))


def _message(message: Mapping[str, Any], where: str) -> Turn:
    """Return a turn in OpenAI's form: `role` and `content`, with calls of tools."""
    given = {field: value for field, value in message.items() if value not in (None, [])}
    role = text_of(given, "role", where)
    if role not in ROLES:
        meant = SPEAKERS.get(role.casefold()) or {"developer": "system", "function": "tool"}.get(role)
        remedy = f'write "{meant}"' if meant else f"known: {', '.join(ROLES)}"
        raise DataError(f"{where}: the role {_quoted(role)} is not known to chat templates; {remedy}")
    of_role = {
        "assistant": ("tool_calls", "reasoning_content", "weight"),
        "tool": ("tool_call_id", "name"),
    }.get(role, ())
    refuse_unknown(given, ("role", "content", *of_role), where)
    calls = tool_calls_of(given.get("tool_calls"), where)
    return Turn(
        role,
        text_of(given, "content", where) if "content" in given or not calls else "",
        tool_calls=calls,
        tool_call_id=text_of(given, "tool_call_id", where) if "tool_call_id" in given else None,
        name=text_of(given, "name", where) if "name" in given and role == "tool" else None,
        reasoning_content=text_of(given, "reasoning_content", where) if "reasoning_content" in given else None,
        trained=_weight(given, where),
    )


def _weight(given: Mapping[str, Any], where: str) -> bool:
    """Return whether a message carries a loss, by OpenAI's `weight`: 0 or 1."""
    weight = given.get("weight", 1)
    if weight not in (0, 1):
        raise DataError(f'{where}: "weight" is {kind_of(weight)} other than 0 and 1; an answer is trained or it is not')
    return bool(weight)


def _quoted(name: str) -> str:
    """Quote a short name from a file as JSON; anything longer may be text of an example, and is not repeated."""
    return json.dumps(name) if len(name) <= 20 and name.isprintable() and " " not in name else "that is written there"


def near(name: str, known: Collection[str]) -> str | None:
    """Return the known name that a name is a misspelling of, if any."""
    plain = name.casefold().strip()
    if name not in known and plain in known:
        return plain
    return next(iter(difflib.get_close_matches(plain, known, n=1, cutoff=0.75)), None)


def refuse_unknown(given: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Raise DataError for a field that is neither known nor without a part in training."""
    for field, value in given.items():
        if field in known or field in NEUTRAL:
            continue
        meant = near(field, known)
        if meant or isinstance(value, bool | int | float) or value not in ("", [], {}):
            remedy = (
                f'did you mean "{meant}"?'
                if meant
                else f"it would have no effect; remove it, or use {', '.join(known)}"
            )
            raise DataError(f'{where}: "{field}" is no known field; {remedy} (id, source and the like may stay)')


def text_of(holder: Mapping[str, Any], field: str, where: str) -> str:
    """Return the text in a field; raise DataError for anything else."""
    if not isinstance(holder.get(field), str):
        raise DataError(f'{where}: "{field}" is {kind_of(holder.get(field))}; expected a string')
    return str(holder[field])


def kind_of(value: object) -> str:
    """Say in words what a JSON value is, without quoting it."""
    if value is None or value in ([], ""):
        return "empty"
    return {dict: "an object", list: "a list", bool: "a boolean", str: "a string"}.get(type(value), "a number")
