"""How commands end and begin: an error is one line, and what lives in the other environment is named."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from umbel.errors import ConfigError, UmbelError

ENVIRONMENTS = {"site": ".venv-engine", "server": ".venv"}


def import_part(module: str, extra: str) -> Any:
    """A part of umbel that lives in one of the two environments."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"this command belongs to the other environment, the one with umbel[{extra}]: {ENVIRONMENTS[extra]} "
            f"({error.name} is not in this one)"
        ) from error


@contextmanager
def explained() -> Iterator[None]:
    """An error of ours is a message and exit status 1, not a traceback."""
    try:
        yield
    except (UmbelError, OSError) as error:
        for line in str(error).splitlines():
            print(f"umbel: {line}", file=sys.stderr)
        raise typer.Exit(1) from None
