"""`Target`: a reader of bytes for `scripts/fuzz`; `damaging`: valid inputs, damaged ones and any bytes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

TOKENS = [
    b"\x00", b"\xff", b"[", b"{", b'"', b"\\ud800", b"NaN", b"-1", b"1e999", b"9" * 40, b"null", b"../", b"\r\n",
    b"@v1", b"\xde\xff\xff", b"\xc7\x0c\xff", b"\x80", b"[" * 2000,
]  # fmt: skip


@dataclass(frozen=True)
class Target:
    """One reader of bytes: `read` returns or raises an umbel error; any other exception is a failure."""

    name: str
    inputs: st.SearchStrategy[bytes]
    read: Callable[[bytes], object]


def damaging(seeds: list[bytes]) -> st.SearchStrategy[bytes]:
    """Return seeds, damaged ones and arbitrary bytes."""
    return st.sampled_from(seeds) | damaged(seeds) | st.binary(max_size=300)


@st.composite
def damaged(draw: Any, seeds: list[bytes]) -> bytes:
    """Draw a valid input with up to five cuts, flipped bytes, repetitions and insertions."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 5))):
        at, length = draw(st.integers(0, len(data))), draw(st.integers(1, 8))
        change = draw(st.sampled_from(("cut", "flip", "repeat", "insert", "token", "end")))
        if change == "cut":
            del data[at : at + length]
        elif change == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif change == "repeat":
            data[at:at] = data[at : at + length] * draw(st.integers(1, 50))
        elif change == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=8))
        elif change == "token":
            data[at:at] = draw(st.sampled_from(TOKENS))
        else:
            del data[at:]
    return bytes(data)
