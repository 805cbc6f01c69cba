"""Users' examples on their way to the daemon: pseudonyms only, texts only, and no unknown field."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from serving.user_example import MAX_EXAMPLE_BYTES, ConsentSettings, Example, unfit

GOOD: dict[str, Any] = {
    "user": "0f" * 32, "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
    "adapter": "support", "version": "support@v2", "kind": "accepted",
    "rejected": "",
}  # fmt: skip


def test_an_example_and_the_settings_are_read_as_they_were_written() -> None:
    example = Example.model_validate(GOOD)
    assert example.model_dump() == GOOD
    assert Example.model_validate({**GOOD, "version": "base"}).adapter == "support", "before its first version"
    settings = ConsentSettings(key="ab" * 32, socket=Path("/run/operator.sock"), models={"support": "support"})
    assert ConsentSettings.model_validate_json(settings.model_dump_json()) == settings


@pytest.mark.parametrize(
    "change",
    [{"user": "eva"}, {"user": "0F" * 32}, {"user": "0f" * 33}, {"kind": "rejected"}, {"name": "eva"},
     {"version": "triage@v2"}, {"version": "support"}, {"adapter": "Support"}, {"adapter": "../support"},
     {"messages": [{"role": "user", "content": ["x"]}]}, {"messages": [{"role": "user", "content": "x", "name": "e"}]}],
)  # fmt: skip
def test_an_example_that_names_a_user_or_is_no_text_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Example.model_validate({**GOOD, **change})


def texts(*contents: object, role: object = "user") -> list[object]:
    return [{"role": role, "content": content} for content in contents]


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        (texts("a\tb\nc\r\nd", "ü" * 10), None),
        (texts("x" * MAX_EXAMPLE_BYTES), None),
        (texts("x" * MAX_EXAMPLE_BYTES, "y"), "its texts have 65537 bytes, not 1 to 65536 (64 KiB)"),
        (texts("🙂" * (MAX_EXAMPLE_BYTES // 4 + 1)), "its texts have 65540 bytes, not 1 to 65536 (64 KiB)"),
        ([], "its texts have 0 bytes, not 1 to 65536 (64 KiB)"),
        (texts("\x1b[1K"), "a text holds the control character U+001B; only tabs and line breaks are kept"),
        (texts("a\rb"), "a text holds the control character U+000D; only tabs and line breaks are kept"),
        (texts("\ud800"), "a text holds the control character U+D800; only tabs and line breaks are kept"),
        (texts("x", role="developer\n"), "a role is none of system, user, assistant, tool"),
        (texts("x", role=["user"]), "a role is none of system, user, assistant, tool"),
        (texts(7), "a content is no text"),
        (["x"], "a message is more than a role and a content"),
    ],
)  # fmt: skip
def test_what_cannot_be_judged_or_is_too_much_is_refused_with_the_reason(messages: list[Any], why: str | None) -> None:
    assert unfit(messages) == why


def test_the_daemon_refuses_it_without_quoting_it() -> None:
    with pytest.raises(ValidationError) as refused:
        Example.model_validate({**GOOD, "messages": texts("secret\x1b")})
    assert "secret" not in str(refused.value)
    with pytest.raises(ValidationError) as other:
        Example.model_validate({**GOOD, "messages": texts("secret"), "version": "triage@v2"})
    assert "secret" not in str(other.value), "nor in a traceback"
    (mistake,) = refused.value.errors()
    assert (mistake["loc"], "U+001B" in mistake["msg"], "secret" in mistake["msg"]) == ((), True, False)
