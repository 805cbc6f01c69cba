"""`escaped`, `one_line`, `values`: text that others wrote, made fit for a terminal or a log; `control` refuses it.

A terminal obeys control characters: a text with them can move the cursor, and overwrite what stands beside it. Marks
of direction and characters without width make a text look like another one.
"""

import json
import re
import unicodedata
from collections.abc import Collection
from typing import Annotated, Any

from pydantic import BeforeValidator

INVISIBLE = frozenset({"Cc", "Cf", "Zl", "Zp", "Co", "Cs", "Cn"})
"""Unicode categories of characters that are escaped: controls, marks of direction, separators of lines."""
BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0") | {
    chr(code)
    for first, last in ((0x180B, 0x180F), (0xFE00, 0xFE0D), (0xE0100, 0xE01EF))
    for code in range(first, last + 1)
}
"""Letters and marks of other categories that show nothing."""
LONGEST_REASON = 2000
"""Largest length of a reason in a message, in characters."""
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]|\r(?!\n)")


def escaped(text: str, keep: str = "\n", also: Collection[str] = ()) -> str:
    r"""Return a text in which every character that cannot be seen is written as in JSON.

    Those in `keep` stay, those in `also` are escaped, too.

    >>> escaped("ward\t7\x1b[2K"), escaped("ward\n7"), escaped("ward\n7", keep="")
    ('ward\\t7\\u001b[2K', 'ward\n7', 'ward\\n7')
    """
    if text.isascii() and text.isprintable() and not also:
        return text
    return "".join(
        _as_json(letter) if letter not in keep and (letter in also or _is_invisible(letter)) else letter
        for letter in text
    )


def one_line(text: str, longest: int | None = None) -> str:
    """Return a text as one line without a character that cannot be seen; beyond `longest` characters it is cut."""
    line = escaped(text, keep="")
    return line if longest is None or len(line) <= longest else f"{line[: longest - 1]}…"


def values(value: Any) -> Any:
    """Return JSON values in which each text, the keys of objects included, is one line."""
    if isinstance(value, str):
        return one_line(value)
    if isinstance(value, dict):
        return {values(key): values(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [values(one) for one in value]
    return value


def control(text: str) -> str | None:
    """Return the name of the first character that a text to be kept may not have, such as U+001B; None without one.

    Tabs and line breaks are fine. Halves of surrogate pairs are not: no file can hold them.
    """
    found = _CONTROL.search(text)
    return f"U+{ord(found[0]):04X}" if found else None


def _line(value: object) -> object:
    return one_line(value, LONGEST_REASON) if isinstance(value, str) else value


Reason = Annotated[str, BeforeValidator(_line)]
"""The type of a reason in a message: one line, and cut to LONGEST_REASON.

Nobody is refused for it: errors of SGLang, which have several lines, become reasons.
"""


def _is_invisible(letter: str) -> bool:
    return letter in BLANK or unicodedata.category(letter) in INVISIBLE


def _as_json(letter: str) -> str:
    return "\\u007f" if letter == "\x7f" else json.dumps(letter)[1:-1]
