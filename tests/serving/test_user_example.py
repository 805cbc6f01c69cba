"""Users' examples on their way to the daemon: pseudonyms only, texts only, and no unknown field."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from serving.user_example import ConsentSettings, Example

GOOD: dict[str, Any] = {
    "user": "0f" * 32, "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
    "version": "support@v2", "kind": "accepted",
}  # fmt: skip


def test_an_example_and_the_settings_are_read_as_they_were_written() -> None:
    example = Example.model_validate(GOOD)
    assert example.model_dump() == GOOD
    settings = ConsentSettings(key="ab" * 32, socket=Path("/run/site.sock"), models=("support",))
    assert ConsentSettings.model_validate_json(settings.model_dump_json()) == settings


@pytest.mark.parametrize(
    "change",
    [{"user": "eva"}, {"user": "0F" * 32}, {"user": "0f" * 33}, {"kind": "rejected"}, {"name": "eva"},
     {"messages": [{"role": "user", "content": ["x"]}]}, {"messages": [{"role": "user", "content": "x", "name": "e"}]}],
)  # fmt: skip
def test_an_example_that_names_a_user_or_is_no_text_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Example.model_validate({**GOOD, **change})
