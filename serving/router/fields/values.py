"""`Check`: decides about one value of a request; and the checks of numbers, texts, lists and objects.

A check returns what is forwarded, and raises RequestRefused with the value's place and the remedy otherwise. It never
looks at more of a value than its bound allows.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from umbel.errors import RequestRefused

Check = Callable[[Any, str, int], Any]
"""(value, where it stands in the request, number of tokens in the base's vocabulary) → what is forwarded."""

INT64 = (1 << 63) - 1
MOST_DEPTH = 64
"""Levels that free JSON (arguments of a call, a schema) may be nested."""
LONGEST_NAME = 256
"""Characters of a name: of a function, an author, a call."""


def refuse(where: str, problem: str, remedy: str) -> NoReturn:
    """Raise RequestRefused for the value at `where`."""
    raise RequestRefused(f"{where!r} {problem}; {remedy}.", where)


def integer(low: int, high: int) -> Check:
    """Take whole numbers from `low` to `high`; a boolean is none."""

    def check(value: Any, where: str, vocab: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            refuse(where, f"is {_kind(value)}", "send a number" if isinstance(value, str) else "send a whole number")
        _within(value, where, low, high)
        return value

    return check


def number(low: float, high: float, *, above: bool = False) -> Check:
    """Take numbers from `low` to `high`; with `above`, `low` itself is too low."""

    def check(value: Any, where: str, vocab: int) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            refuse(where, f"is {_kind(value)}", "send a number")
        if above and value == low:
            refuse(where, f"is {low}", f"send more than {low}")
        _within(value, where, low, high)
        return value

    return check


def _within(value: float, where: str, low: float, high: float) -> None:
    if not value >= low:  # also NaN
        refuse(where, f"is below {low}", "send more")
    if not value <= high:
        refuse(where, f"is over {high}", "ask for less")


def flag(value: Any, where: str, vocab: int) -> bool:
    """Take true and false."""
    if not isinstance(value, bool):
        refuse(where, f"is {_kind(value)}", "send true or false")
    return value


def only(wanted: object, reason: str) -> Check:
    """Take one value, which asks for nothing; `reason` says why no other."""

    def check(value: Any, where: str, vocab: int) -> Any:
        if type(value) is not type(wanted) or value != wanted:
            refuse(where, f"cannot be chosen here ({reason})", "leave it out")
        return value

    return check


def text(most: int | None = None, *, least: int = 0) -> Check:
    """Take texts of `least` to `most` characters; the body's own limit holds for all."""

    def check(value: Any, where: str, vocab: int) -> str:
        if not isinstance(value, str):
            refuse(where, f"is {_kind(value)}", "send a text")
        if len(value) < least:
            refuse(where, "is empty", "send a text, or leave it out")
        if most is not None and len(value) > most:
            refuse(where, f"is longer than {most} characters", "send a shorter one")
        return value

    return check


name = text(LONGEST_NAME, least=1)


def choice(*allowed: str) -> Check:
    """Take one of a few texts."""

    def check(value: Any, where: str, vocab: int) -> str:
        if not isinstance(value, str) or value not in allowed:
            refuse(where, f"is {_shown(value)}", f"use {_or(allowed)}")
        return value

    return check


def array(item: Check, most: int, *, least: int = 0) -> Check:
    """Take lists of `least` to `most` items."""

    def check(value: Any, where: str, vocab: int) -> list[Any]:
        if not isinstance(value, list):
            refuse(where, f"is {_kind(value)}", "send a list")
        if len(value) < least:
            refuse(where, f"has {len(value)} items", f"send at least {least}")
        if len(value) > most:
            refuse(where, f"holds more than {most} items", "send fewer")
        return [item(one, f"{where}[{index}]", vocab) for index, one in enumerate(value)]

    return check


def record(
    fields: Mapping[str, Check], *, dropped: frozenset[str] = frozenset(), needed: tuple[str, ...] = ()
) -> Check:
    """Take objects of these fields. `dropped` and what is null are left out; what is `needed` must be there."""

    def check(value: Any, where: str, vocab: int) -> dict[str, Any]:
        if not isinstance(value, dict):
            refuse(where, f"is {_kind(value)}", "send an object")
        kept = {}
        for key, one in value.items():
            if one is None or key in dropped:
                continue
            if key not in fields:
                refuse(f"{where}.{key[:100]}", "is not a field that is known here", "leave it out")
            kept[key] = fields[key](one, f"{where}.{key}", vocab)
        for key in needed:
            if key not in kept:
                refuse(f"{where}.{key}", "is missing", "send it")
        return kept

    return check


def by_type(kinds: Mapping[str, Check], otherwise: str | None = None) -> Check:
    """Take objects whose `type` names one of `kinds`; `otherwise` is the kind of one without a type."""

    def check(value: Any, where: str, vocab: int) -> Any:
        if not isinstance(value, dict):
            refuse(where, f"is {_kind(value)}", "send an object")
        kind = value.get("type", otherwise)
        if not isinstance(kind, str) or kind not in kinds:
            refuse(where, f"is of type {_shown(kind)}", f"only {_or(kinds)} is answered here")
        return kinds[kind](value, where, vocab)

    return check


def text_or(other: Check) -> Check:
    """Take a text, or what `other` takes."""

    def check(value: Any, where: str, vocab: int) -> Any:
        return value if isinstance(value, str) else other(value, where, vocab)

    return check


def token_ids(most: int, *, least: int = 1) -> Check:
    """Take lists of tokens of the base's vocabulary."""

    def check(value: Any, where: str, vocab: int) -> list[int]:
        if not isinstance(value, list):
            refuse(where, f"is {_kind(value)}", "send a list of token ids")
        if not least <= len(value) <= most:
            refuse(where, f"holds {len(value)} token ids", f"send {least} to {most}")
        for token in value:
            if type(token) is not int or not 0 <= token < vocab:
                refuse(where, f"holds {_shown(token)}, which is no token id of the base", f"send 0 to {vocab - 1}")
        return value

    return check


def free(most_bytes: int | None = None) -> Check:
    """Take any JSON of at most `most_bytes` characters, MOST_DEPTH levels, and numbers that every reader can hold."""

    def check(value: Any, where: str, vocab: int) -> Any:
        size, open_ = 0, [iter([value])]  # one iterator for each level: a list of all that is open would be long
        while open_:
            for one in open_[-1]:
                size += 1 + (len(one) if isinstance(one, str) else 0)
                if len(open_) > MOST_DEPTH:
                    refuse(where, f"is nested deeper than {MOST_DEPTH} levels", "send a flatter one")
                if isinstance(one, int | float) and not (math.isfinite(one) and abs(one) <= INT64):
                    refuse(where, "holds a number beyond 64 bits", "send it as a text")
                if isinstance(one, dict):
                    size += sum(map(len, one))
                    open_.append(iter(one.values()))
                elif isinstance(one, list):
                    open_.append(iter(one))
                if most_bytes is not None and size > most_bytes:
                    refuse(where, f"is longer than {most_bytes} characters", "send a shorter one")
                if isinstance(one, dict | list):
                    break
            else:
                open_.pop()
        return value

    return check


def mapping(value: Any, where: str, vocab: int) -> dict[str, Any]:
    """Take any JSON object, within the bounds of `free`."""
    if not isinstance(value, dict):
        refuse(where, f"is {_kind(value)}", "send an object")
    return dict(free()(value, where, vocab))


def _kind(value: object) -> str:
    kinds = {bool: "a boolean", str: "a string", list: "a list", dict: "an object", type(None): "null"}
    return kinds.get(type(value), "a number")


def _shown(value: object) -> str:
    if isinstance(value, str):
        return repr(value[:100])
    return _kind(value) if isinstance(value, list | dict) else str(value)[:100]


def _or(allowed: Mapping[str, Any] | tuple[str, ...]) -> str:
    quoted = [repr(one) for one in allowed]
    return " or ".join(filter(None, (", ".join(quoted[:-1]), quoted[-1])))
