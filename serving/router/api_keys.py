"""`ApiKeys`: decides if a request has one of the users' API keys, where `[engine].api_keys` names a file of them."""

import secrets
from collections.abc import Iterable
from pathlib import Path

from umbel import secret_file


class ApiKeys:
    """The keys of one run of the engine; a key that is added to the file holds from the next start on."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._keys = [key.encode() for key in keys]

    @classmethod
    def read(cls, path: Path) -> "ApiKeys":
        """Read a file of keys; raise ConfigError if it holds none or if others can read it."""
        return cls(secret_file.read_keys(path))

    def admit(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        """Return whether a request has one of the keys, as `Authorization: Bearer KEY` or `x-api-key: KEY`."""
        known = False
        for given in _given(headers):
            for key in self._keys:  # compare with all, so that the time it takes does not tell which one fits
                known |= secrets.compare_digest(given, key)
        return known


def _given(headers: Iterable[tuple[bytes, bytes]]) -> Iterable[bytes]:
    for name, value in headers:
        kind, _, key = value.partition(b" ")
        if name == b"authorization" and kind.lower() == b"bearer":
            yield key.strip()
        if name == b"x-api-key":
            yield value.strip()
