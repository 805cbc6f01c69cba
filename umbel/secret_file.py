"""`read`, `read_keys`: read files that hold a secret, if only their owner can read them."""

import os
import stat
from pathlib import Path

from umbel.errors import ConfigError

SHORTEST = 16
"""Smallest length of a secret, in characters."""


def opener(path: str, flags: int) -> int:
    """Open a file so that a new one is its owner's only (mode 0600); for `open(…, opener=secret_file.opener)`."""
    return os.open(path, flags, 0o600)


def read(path: Path, what: str) -> str:
    """Return a file's text; raise ConfigError if it, `what` ("the token"), cannot be read, or others can read it."""
    try:
        mode, text = stat.S_IMODE(path.stat().st_mode), path.read_text()
    except OSError as error:
        raise ConfigError(f"{path}: {what} cannot be read ({error.strerror}); name a file that holds it") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not text; {what} has letters and digits only") from error
    if mode & 0o077:
        raise ConfigError(f"{path}: others can read {what}; chmod 600 {path}")
    return text


def read_keys(path: Path) -> tuple[str, ...]:
    """Return the API keys in a file: one per line; `#` begins a comment line.

    Raises ConfigError for a line that cannot be a key and for a file without keys. No message contains a key.
    """
    lines = [(number, line.strip()) for number, line in enumerate(read(path, "the API keys").splitlines(), start=1)]
    keys = {number: line for number, line in lines if line and not line.startswith("#")}
    for number, key in keys.items():
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise ConfigError(f"{path}, line {number}: not an API key; write one per line, in ASCII, without spaces")
        if len(key) < SHORTEST:
            raise ConfigError(
                f"{path}, line {number}: shorter than {SHORTEST} characters, so that it can be guessed; "
                "`openssl rand -hex 32` makes a key"
            )
    if not keys:
        raise ConfigError(f"{path}: holds no API key; write one per line, or remove the api_keys that name it")
    return tuple(keys.values())
