"""`conversation_of`: the conversation in one JSON object of a data file, whichever of the known shapes it has.

Nothing that was written vanishes: each field is used, is known to have no part in training, or is refused by name. No
message of this module holds text of an example.
"""

import difflib
import itertools
import json
from collections.abc import Collection, Mapping
from typing import Any

from client.data.conversation import Conversation, Turn
from client.data.tool_fields import tool_calls_of, tools_of
from umbel.errors import DataError

EXPECTED = (
    'expected a JSON object with "messages" (a list of {"role", "content"}), with "conversations" (a list of {"from", '
    '"value"}), with "prompt" and "completion", or with "instruction", "output" and perhaps "input"'
)
ROLES = ("system", "user", "assistant", "tool")
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""ShareGPT's `from` → role."""
SHAPES: dict[tuple[str, ...], tuple[str, ...]] = {
    ("messages",): ("system", "tools"),
    ("conversations",): ("system", "tools"),
    ("prompt", "completion"): ("system", "history"),
    ("instruction", "output"): ("input", "system", "history"),
}
"""Fields that make a shape → the further fields that it may have."""
GROUP = "group"
"""Field of any shape that names what the example is about; see `client.data.conversation.group_of`."""
DOMAIN = "domain"
"""Field of any shape that names the part of the data which the example belongs to; see `client.worth.row_keys`. With a
value that is neither a text nor a whole number it has no part in training."""
NEUTRAL = frozenset([
    "_id", "id", "uid", "uuid", "idx", "index", "hash", "source", "src", "dataset", "origin", "category", "topic",
    "subject", DOMAIN, "task", "task_type", "type", "tag", "tags", "lang", "language", "split", "date", "time",
    "timestamp", "created", "created_at", "updated", "updated_at", "author", "user_id", "url", "link", "license",
    "licence", "version", "model", "score", "rating", "quality", "difficulty", "comment", "comments", "note",
    "notes", "meta", "metadata", "info", "conversation_id", "thread_id", "session_id", "request_id", "file",
    "filename", "path", "page", "row", "line", "number",
])  # fmt: skip
"""Fields without a part in training, of an example or of a message."""


def conversation_of(example: Mapping[str, Any], where: str) -> Conversation:
    """Return the conversation of an example; raise DataError, naming `where` and the field, for anything unclear.

    >>> conversation_of({"prompt": "1 + 1 =", "completion": "2"}, "train.jsonl:1")
    Conversation(turns=(Turn(role='user', ...), Turn(role='assistant', ...)), tools=(), group=None, domain=None)
    """
    shape = _shape_of(example, where)
    known = (*shape, *SHAPES[shape], GROUP)
    given = {field: value for field, value in example.items() if value is not None or field in shape}
    _refuse_unknown(given, known, where)
    if shape in (("messages",), ("conversations",)):
        turns = _turns(given[shape[0]], shape[0], where)
    else:
        turns = [*_history(given.get("history"), where), *_pair(given, shape, where)]
    turns = [*_system(given.get("system"), turns, where), *turns]
    for label, turn in turns:
        _require_written(turn, f"{where}: {label}")
    _require_order(turns, where)
    tools, group = tools_of(given.get("tools"), where), _group(given.get(GROUP), where)
    domain = example.get(DOMAIN)
    named = isinstance(domain, str | int) and not isinstance(domain, bool) and domain != ""
    return Conversation(tuple(turn for _, turn in turns), tools, group, str(domain) if named else None)


_Labelled = tuple[str, Turn]
"""(place in the example, as `messages[2]`; the turn)."""


def _shape_of(example: Mapping[str, Any], where: str) -> tuple[str, ...]:
    found = [shape for shape in SHAPES if all(field in example for field in shape)]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"{where}: more than one kind of example; {EXPECTED}")
    fields = {field for shape in SHAPES for field in shape}
    hints = [f'did you mean "{near}" by "{name}"?' for name in example if (near := _near(name, fields - {*example}))]
    raise DataError(f"{where}: no kind of example; {' '.join((*hints, ''))}{EXPECTED}")


def _near(name: str, known: Collection[str]) -> str | None:
    """Return the known name that a name is a misspelling of, if any."""
    plain = name.casefold().strip()
    if name not in known and plain in known:
        return plain
    return next(iter(difflib.get_close_matches(plain, known, n=1, cutoff=0.75)), None)


def _refuse_unknown(given: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Raise DataError for a field that is neither known nor without a part in training."""
    for field, value in given.items():
        if field in known or field in NEUTRAL:
            continue
        near = _near(field, known)
        if near or isinstance(value, bool | int | float) or value not in ("", [], {}):
            remedy = (
                f'did you mean "{near}"?' if near else f"it would have no effect; remove it, or use {', '.join(known)}"
            )
            raise DataError(f'{where}: "{field}" is no known field; {remedy} (id, source and the like may stay)')


def _group(group: object, where: str) -> str | None:
    """Return the name of an example's group: a text or a whole number; an empty one is none."""
    if group in (None, ""):
        return None
    if isinstance(group, float) and group.is_integer():  # a table with gaps writes whole numbers so
        group = int(group)
    if isinstance(group, bool) or not isinstance(group, str | int):
        kind = "a number with a fraction" if isinstance(group, float) else _kind(group)
        raise DataError(f'{where}: "{GROUP}" is {kind}; name the group by a text or a whole number')
    return str(group)


def _text(holder: Mapping[str, Any], field: str, where: str) -> str:
    if not isinstance(holder.get(field), str):
        raise DataError(f'{where}: "{field}" is {_kind(holder.get(field))}; expected a string')
    return str(holder[field])


def _kind(value: object) -> str:
    if value is None or value in ([], ""):
        return "empty"
    return {dict: "an object", list: "a list", bool: "a boolean", str: "a string"}.get(type(value), "a number")


def _pair(given: Mapping[str, Any], shape: tuple[str, ...], where: str) -> list[_Labelled]:
    question, answer = (_text(given, field, where) for field in shape)
    if "input" in given:
        question = "\n\n".join(filter(None, (question, _text(given, "input", where))))
    return [(shape[0], Turn("user", question)), (shape[1], Turn("assistant", answer))]


def _history(history: object, where: str) -> list[_Labelled]:
    """Return the earlier turns of Alpaca's `history`: a list of [question, answer]."""
    if history in (None, [], ""):
        return []
    pairs = history if isinstance(history, list) else [history]
    turns = []
    for index, pair in enumerate(pairs):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise DataError(f'{where}: history[{index}] is no pair; expected [["question", "answer"], …]')
        turns += [(f"history[{index}]", Turn("user", pair[0])), (f"history[{index}]", Turn("assistant", pair[1]))]
    return turns


def _system(system: object, turns: list[_Labelled], where: str) -> list[_Labelled]:
    if system in (None, ""):
        return []
    if not isinstance(system, str):
        raise DataError(f'{where}: "system" is {_kind(system)}; expected a string')
    if turns and turns[0][1].role == "system":
        raise DataError(f'{where}: "system" stands beside a system turn in {turns[0][0]}; keep one of them')
    return [("system", Turn("system", system))]


def _turns(messages: object, field: str, where: str) -> list[_Labelled]:
    if not isinstance(messages, list) or not messages:
        raise DataError(f'{where}: "{field}" is {_kind(messages)}; expected a list, {EXPECTED}')
    turns = []
    for index, message in enumerate(messages):
        label = f"{field}[{index}]"
        if not isinstance(message, dict):
            raise DataError(f"{where}: {label}: expected an object, not {_kind(message)}")
        spoken = field == "conversations" and "role" not in message
        turns.append((label, (_spoken if spoken else _message)(message, f"{where}: {label}")))
    return turns


def _spoken(message: Mapping[str, Any], where: str) -> Turn:
    """Return a turn in ShareGPT's form: `from` and `value`."""
    given = {field: value for field, value in message.items() if value is not None}
    _refuse_unknown(given, ("from", "value", "weight"), where)
    speaker = _text(given, "from", where)
    if speaker not in SPEAKERS:
        raise DataError(
            f"{where}: {_quoted(speaker)} is no known speaker; known: {', '.join(SPEAKERS)}; write calls of tools and "
            'their results as "messages"'
        )
    return Turn(SPEAKERS[speaker], _text(given, "value", where), trained=_weight(given, where))


def _message(message: Mapping[str, Any], where: str) -> Turn:
    """Return a turn in OpenAI's form: `role` and `content`, with calls of tools."""
    given = {field: value for field, value in message.items() if value not in (None, [])}
    role = _text(given, "role", where)
    if role not in ROLES:
        meant = SPEAKERS.get(role.casefold()) or {"developer": "system", "function": "tool"}.get(role)
        remedy = f'write "{meant}"' if meant else f"known: {', '.join(ROLES)}"
        raise DataError(f"{where}: the role {_quoted(role)} is not known to chat templates; {remedy}")
    of_role = {
        "assistant": ("tool_calls", "reasoning_content", "weight"),
        "tool": ("tool_call_id", "name"),
    }.get(role, ())
    _refuse_unknown(given, ("role", "content", *of_role), where)
    calls = tool_calls_of(given.get("tool_calls"), where)
    return Turn(
        role,
        _text(given, "content", where) if "content" in given or not calls else "",
        tool_calls=calls,
        tool_call_id=_text(given, "tool_call_id", where) if "tool_call_id" in given else None,
        name=_text(given, "name", where) if "name" in given and role == "tool" else None,
        reasoning_content=_text(given, "reasoning_content", where) if "reasoning_content" in given else None,
        trained=_weight(given, where),
    )


def _weight(given: Mapping[str, Any], where: str) -> bool:
    """Return whether a message carries a loss, by OpenAI's `weight`: 0 or 1."""
    weight = given.get("weight", 1)
    if weight not in (0, 1):
        raise DataError(f'{where}: "weight" is {_kind(weight)} other than 0 and 1; an answer is trained or it is not')
    return bool(weight)


def _quoted(name: str) -> str:
    """Quote a short name from a file as JSON; anything longer may be text of an example, and is not repeated."""
    return json.dumps(name) if len(name) <= 20 and name.isprintable() and " " not in name else "that is written there"


def _require_written(turn: Turn, where: str) -> None:
    if turn.role == "assistant" and not turn.content.strip() and not turn.tool_calls:
        raise DataError(f"{where}: the answer is empty; write one or remove the line")


def _require_order(turns: list[_Labelled], where: str) -> None:
    """Raise DataError for turns that no request could have, or that would teach nothing."""
    answers = [turn for _, turn in turns if turn.role == "assistant"]
    if not answers:
        raise DataError(f'{where}: no message has the role "assistant", so there is no answer to learn')
    for (_, before), (label, turn) in itertools.pairwise(turns):
        if before.role == turn.role == "assistant":
            raise DataError(f"{where}: {label}: an answer follows an answer; join them, or write the turn between them")
    label, last = turns[-1]
    if last.role != "assistant":
        raise DataError(f"{where}: {label}: the last turn has no answer; add the answer or remove the turn")
    if not any(turn.trained for turn in answers):
        raise DataError(f'{where}: every answer has "weight": 0, so there is nothing to learn; remove the line')
