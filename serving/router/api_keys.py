"""`ApiKeys`: says which names a request opens, by the users' keys; `Access`: those names.

As soon as a site has any file of keys, every request needs one of its keys. A name that has keys of its own is seen and
reached with those only; the base, and names without keys of their own, with any key of the site. A key in several files
opens what each of them opens.
"""

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

from serving.run_dir import RouterSettings
from umbel import secret_file


@dataclass(frozen=True)
class Access:
    """The names that a request opens: all but those that have keys of which it brings none.

    >>> Access(closed=frozenset({"triage"})).sees("support")
    True
    """

    closed: frozenset[str] = frozenset()
    """Names of adapters that are, to this request, as if they did not exist."""

    def sees(self, adapter: str | None) -> bool:
        """Return whether a name of this adapter exists for the request; None is the base, which all share."""
        return adapter not in self.closed


ALL = Access()
"""Access to every name."""


class ApiKeys:
    """The keys of one run of the engine; a key that is added to a file holds from the next start on.

    >>> keys = ApiKeys(["sk-of-the-site-00"], {"triage": ["sk-of-triage-0000"]})
    >>> keys.admit([(b"x-api-key", b"sk-of-the-site-00")])
    Access(closed=frozenset({'triage'}))
    """

    def __init__(self, site: Iterable[str] = (), adapters: Mapping[str, Iterable[str]] | None = None) -> None:
        """Take the keys of the site, and by its name those of each adapter that has keys of its own."""
        self._opened = {key: frozenset[str]() for key in site}
        self._closed = frozenset(adapters or ())
        for name, keys in (adapters or {}).items():
            for key in keys:
                self._opened[key] = self._opened.get(key, frozenset()) | {name}

    @classmethod
    def read(cls, settings: RouterSettings) -> Self:
        """Read the files of keys; raise ConfigError if one holds none or if others can read it."""
        site = secret_file.read_keys(settings.api_keys) if settings.api_keys is not None else ()
        return cls(site, {name: secret_file.read_keys(file) for name, file in settings.adapter_keys.items()})

    def admit(self, headers: Iterable[tuple[bytes, bytes]]) -> Access | None:
        """Return the names that a request opens, by `Authorization: Bearer KEY` or `x-api-key: KEY`.

        None for a request without a known key; where the site has no keys, each request opens all names.
        """
        if not self._opened:
            return ALL
        known, opened = False, frozenset[str]()
        for given in _given(headers):
            for key, names in self._opened.items():  # all of them, so that the time does not tell which one fits
                fits = secrets.compare_digest(given, key.encode())
                known |= fits
                opened |= names if fits else frozenset()
        return Access(self._closed - opened) if known else None

    def guard(self, adapter: str | None) -> bool:
        """Return whether an adapter has keys of its own; None is the base, which has none."""
        return adapter in self._closed


def _given(headers: Iterable[tuple[bytes, bytes]]) -> Iterable[bytes]:
    for name, value in headers:
        kind, _, key = value.partition(b" ")
        if name == b"authorization" and kind.lower() == b"bearer":
            yield key.strip()
        if name == b"x-api-key":
            yield value.strip()
