"""Parts that all of umbel's commands share: one-line errors, options, and imports from one environment only."""

import getpass
import importlib
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from umbel.errors import ConfigError, UmbelError
from umbel.printable import escaped, one_line
from umbel.site.config import SiteConfig

ENVIRONMENTS = {"site": ".venv-engine", "server": ".venv"}

SiteFile = Annotated[Path, typer.Argument(help="The site file, such as sites/clinic-a.toml.")]
Registry = Annotated[Path, typer.Option(help="The registry's directory (`registry` in the run configuration).")]
Name = Annotated[str, typer.Argument(help="Such as support.")]
Why = Annotated[str, typer.Option(help="The reason; it is kept in the history.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def calls(*lines: str) -> str:
    """Format example calls as the epilogue of a command's help."""
    return "\n\n".join(("Examples:", *lines))  # a single line break would be taken for a space


@contextmanager
def part_of(extra: str) -> Iterator[None]:
    """Import a part of umbel that one of the two environments has; raise ConfigError in the other one.

    >>> with part_of("server"):
    ...     from server.registry.registry import AdapterRegistry
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"this command belongs to the other environment, the one with umbel[{extra}]: {ENVIRONMENTS[extra]} "
            f"({error.name} is not in this one)"
        ) from error


def require_transformers() -> None:
    """Import transformers, which only the site's environment has: offline, and silent. Raises ConfigError elsewhere."""
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TRANSFORMERS_VERBOSITY="error")
    with part_of("site"):
        importlib.import_module("transformers")


@contextmanager
def explained() -> Iterator[None]:
    """Turn umbel's own errors and OSError into a message on stderr and exit status 1, without a traceback."""
    try:
        yield
    except (UmbelError, OSError) as error:
        told = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        for line in escaped(told.replace("\r\n", "\n")).split("\n"):
            print(f"umbel: {line}", file=sys.stderr)
        raise typer.Exit(1) from None


def say(*lines: object) -> None:
    """Print lines that may hold what others wrote: each is one line, and drives no terminal."""
    for line in lines:
        print(one_line(str(line)))


def adapter_of(config: SiteConfig, adapter: str | None) -> str:
    """Return the adapter that was named, or the site's only one; raise ConfigError where that is none of them."""
    names = ", ".join(config.adapters)
    if adapter is None and len(config.adapters) > 1:
        raise ConfigError(f"this site trains {names}; say which one, with --adapter NAME")
    if adapter is not None and adapter not in config.adapters:
        raise ConfigError(f"{adapter!r} is not trained here: this site trains {names}; name one of them")
    return adapter or config.adapters[0]


def who() -> str:
    """Return user@host of the operator, for the history."""
    return f"{getpass.getuser()}@{socket.gethostname()}"


def reason(why: str) -> str:
    """Return the reason that an operator gave; raise ConfigError for an empty one."""
    if not why.strip():
        raise ConfigError("say why, for the history: --why '…'")
    return why
