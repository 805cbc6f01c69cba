"""The catalogue's hostile examples: bodies of POST /examples, which an operator will read on a terminal."""

import json
from typing import Any

from serving.user_example import MAX_EXAMPLE_BYTES
from tests.toys.hostile.catalogue import Hostile


def given(content: Any = "x", role: Any = "user", **changes: Any) -> bytes:
    """Return an example of one message."""
    fields = {"user": "0f" * 32, "messages": [{"role": role, "content": content}], "adapter": "support"}
    return json.dumps({**fields, "version": "support@v2", "kind": "accepted", **changes}).encode()


EXAMPLES = [  # → the body of an example
    Hostile("a text that overwrites its line", lambda: given("POISON\x1b[1K\r  assistant: ok"), "422", "U\\+001B"),
    Hostile("a carriage return", lambda: given("POISON\rok"), "422", "U\\+000D"),
    Hostile("a null byte", lambda: given("a\0b"), "422", "U\\+0000"),
    Hostile("half of a surrogate pair", lambda: given("\ud800"), "422", "valid string|U\\+D800"),
    Hostile("a role with a line break", lambda: given(role="user\n  assistant"), "422", "a role is none of system"),
    Hostile("a role of another make", lambda: given(role="root"), "422", "a role is none of system"),
    Hostile("a text of 64 KiB and a byte", lambda: given("x" * (MAX_EXAMPLE_BYTES + 1)), "422", "65537 bytes, not 1"),
    Hostile("64 KiB of characters of four bytes", lambda: given("🙂" * MAX_EXAMPLE_BYTES), "422", "262144 bytes"),
    Hostile("no message", lambda: given(messages=[]), "422", "0 bytes"),
    Hostile("a text that is a list", lambda: given(["x"]), "422", "valid string"),
    Hostile("a user's name", lambda: given(user="eva"), "422", "user"),
    Hostile("a version that drives a terminal", lambda: given(version="\x1b[2J"), "422", "version"),
    Hostile("an adapter with a path", lambda: given(adapter="../support"), "422", "adapter"),
    Hostile("an adapter that is not trained here", lambda: given(adapter="triage", version="base"), "404", "triage"),
    Hostile("another adapter's version", lambda: given(version="triage@v2"), "422", "no version of support"),
]  # fmt: skip
