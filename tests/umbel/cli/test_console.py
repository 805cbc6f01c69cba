"""Errors of every command are one line each, and parts of the other environment are named."""

import getpass
from collections.abc import Callable

import click
import pytest

from umbel.cli.console import calls, explained, part_of, reason, who
from umbel.errors import ConfigError


def fail(error: BaseException) -> Callable[[], None]:
    def command() -> None:
        with explained():
            raise error

    return command


@pytest.mark.parametrize(
    ("error", "lines"),
    [
        (ConfigError("one\ntwo"), ["umbel: one", "umbel: two"]),
        (FileNotFoundError(2, "No such file or directory", "/x"), ["umbel: /x: No such file or directory"]),
        (OSError("full"), ["umbel: full"]),
    ],
)
def test_a_known_error_is_a_message_and_exit_status_1(
    error: BaseException, lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(click.exceptions.Exit) as ended:
        fail(error)()
    assert ended.value.exit_code == 1
    said = capsys.readouterr()
    assert (said.out, said.err.splitlines()) == ("", lines)


def test_an_unknown_error_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        fail(ZeroDivisionError())()


@pytest.mark.parametrize(("extra", "environment"), [("site", ".venv-engine"), ("server", ".venv")])
def test_a_part_that_is_not_installed_names_its_environment(extra: str, environment: str) -> None:
    with (
        pytest.raises(ConfigError, match=rf"umbel\[{extra}\]: {environment} \(no_such_module is not in this one\)"),
        part_of(extra),
    ):
        import no_such_module  # noqa: F401


def test_calls_stand_on_lines_of_their_own() -> None:
    assert calls("umbel a", "umbel b") == "Examples:\n\numbel a\n\numbel b"


def test_history_gets_a_reason_and_a_name() -> None:
    assert reason("too slow") == "too slow"
    with pytest.raises(ConfigError, match="say why"):
        reason("  ")
    assert who().startswith(f"{getpass.getuser()}@")
