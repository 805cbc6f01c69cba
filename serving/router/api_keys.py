"""Users' API keys: who may talk to the router, where the site file names a file of keys."""

import secrets
from collections.abc import Iterable
from pathlib import Path

from umbel import secret_file


class ApiKeys:
    """The keys of one run of the engine: what is added to the file holds from the next start on."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._keys = [key.encode() for key in keys]

    @classmethod
    def read(cls, path: Path) -> "ApiKeys":
        """Raise ConfigError for a file that holds none, or that others can read."""
        return cls(secret_file.read_keys(path))

    def admit(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        """Whether a request has one of the keys, as `Authorization: Bearer KEY` or `x-api-key: KEY`."""
        known = False
        for given in _given(headers):
            for key in self._keys:  # all of them, whichever fits: the time tells nothing
                known |= secrets.compare_digest(given, key)
        return known


def _given(headers: Iterable[tuple[bytes, bytes]]) -> Iterable[bytes]:
    for name, value in headers:
        kind, _, key = value.partition(b" ")
        if name == b"authorization" and kind.lower() == b"bearer":
            yield key.strip()
        if name == b"x-api-key":
            yield value.strip()
