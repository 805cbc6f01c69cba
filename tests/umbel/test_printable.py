"""Text that others wrote: nothing in it drives a terminal, fakes a line, or hides what it says."""

import unicodedata

import pytest
from pydantic import BaseModel

from umbel.printable import INVISIBLE, LONGEST_REASON, Reason, control, escaped, one_line, values


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[1K\rb", r"a\u001b[1K\rb"), ("a\x7fb\x9bb", r"a\u007fb\u009bb"), ("a\u202eb\u2066b", r"a\u202eb\u2066b"),
        ("a\u200bb\ufeffb", r"a\u200bb\ufeffb"), ("a\u2028b\u0085b", r"a\u2028b\u0085b"), ("a\u3164b", r"a\u3164b"),
        ("a\tb", r"a\tb"), ("Müller 字 ÷ 🙂", "Müller 字 ÷ 🙂"), ("\ud800", r"\ud800"), ("", ""),
    ],
)  # fmt: skip
def test_what_cannot_be_seen_is_written_as_in_json(text: str, shown: str) -> None:
    assert escaped(text) == one_line(text) == shown


def test_every_character_that_is_left_can_be_seen() -> None:
    left = escaped("".join(map(chr, range(0x11000))), keep="")
    assert {unicodedata.category(letter) for letter in left} & INVISIBLE == set()
    assert len(left.splitlines()) == 1


def test_line_breaks_stay_where_they_are_asked_for_and_nowhere_else() -> None:
    assert escaped("a\nb\x0bc") == "a\nb" + r"\u000bc"
    assert one_line("a\nb") == r"a\nb"
    assert escaped("⟦a⟧", also="⟦") == r"\u27e6a⟧"


def test_values_of_every_depth_are_lines() -> None:
    assert values({"a\n": [{"b": ("c\x1b", 1, None, True)}]}) == {r"a\n": [{"b": [r"c\u001b", 1, None, True]}]}


def test_a_reason_is_one_line_and_no_longer_than_it_may_be() -> None:
    class Said(BaseModel):
        why: Reason

    assert Said(why="ends\nhere").why == r"ends\nhere"
    long = Said(why="\n" * LONGEST_REASON).why
    assert (len(long), long[-1]) == (LONGEST_REASON, "…")
    assert Said.model_validate_json(Said(why="\x1b").model_dump_json()) == Said(why="\x1b"), "the same when read again"


@pytest.mark.parametrize(
    ("text", "found"),
    [("a\tb\nc\r\nd 🙂\u200d", None), ("a\rb", "U+000D"), ("\x1b", "U+001B"), ("\x00", "U+0000"), ("\x9b", "U+009B"),
     ("\udc00", "U+DC00"), ("\x7f", "U+007F")],
)  # fmt: skip
def test_a_text_to_be_kept_may_have_tabs_and_line_breaks_only(text: str, found: str | None) -> None:
    assert control(text) == found
