"""`Keyring`: the sites' public keys in the folder `site-keys`, and the check of what sites sign.

One key is one vote: of several names with one key, only the first in the order of names has it.
"""

import os
import secrets
from contextlib import suppress
from pathlib import Path

from umbel import signing
from umbel.errors import ConfigError
from umbel.signing import PublicKey
from umbel.statements import HelloStatement, UpdateStatement, VerdictStatement

SUFFIX = ".pub"
"""End of a key file's name, after the site's name."""


def new_nonce() -> str:
    """Return a nonce for one question to one site: 32 random bytes, in hex."""
    return secrets.token_hex(32)


class Keyring:
    """The keys in `folder`; without a folder (None) nothing has to be signed, and a site is whoever says its name.

    Raises ConfigError for a folder without keys, or with a file that holds none. A key that is put there later counts
    at once.

    >>> keys = Keyring(Path("/srv/umbel/centre/sites"))
    >>> keys.require("clinic-a", HelloStatement.of(nonce, hello), hello.signature)  # raises unless clinic-a signed it
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._read: dict[str, tuple[tuple[int, int, int], PublicKey]] = {}
        """Name of a file → what tells that it was changed, and the key in it."""
        if folder is not None:
            names = _names(folder)
            if not names:
                raise ConfigError(f"{folder}: no NAME{SUFFIX} here; scripts/make_certs writes a folder of them")
            for site in names:
                self._key(folder, site)

    def require_key(self, site: str) -> None:
        """Raise ConfigError for a site that has no key of its own, where keys are required."""
        if self._folder is not None:
            self._key_of(site, self._folder)

    def require(
        self, site: str, statement: HelloStatement | UpdateStatement | VerdictStatement, signature: str
    ) -> None:
        """Raise AdapterError unless the site signed the statement, ConfigError for a site without a key of its own."""
        if self._folder is not None:
            signing.verify(self._key_of(site, self._folder), statement, signature)

    def _key_of(self, site: str, folder: Path) -> PublicKey:
        """Return a site's key; raise ConfigError where it has none, or shares it with a site of an earlier name."""
        names = _names(folder)
        if site not in names:  # looked up in a listing: a site's name never becomes a path
            raise ConfigError(f"{site} has no key in {folder}; put its public one there, as {site}{SUFFIX}")
        key = self._key(folder, site)
        first = next(name for name in names if name == site or self._is_key(key, folder, name))
        if first != site:
            raise ConfigError(
                f"{site} has the same key as {first} in {folder}, and one key is one vote; make {site} a key of its "
                f"own (`openssl genpkey -algorithm ed25519`)"
            )
        return key

    def _is_key(self, key: PublicKey, folder: Path, site: str) -> bool:
        """Return whether this is another site's key, too; a file that holds none now is that other site's trouble."""
        with suppress(ConfigError):
            return self._key(folder, site).public_bytes_raw() == key.public_bytes_raw()
        return False

    def _key(self, folder: Path, site: str) -> PublicKey:
        """Return the key in a file, which is read again only when it was changed. Raises ConfigError without one."""
        path = folder / f"{site}{SUFFIX}"
        known = self._read.get(path.name)
        try:
            found = path.stat()
        except OSError as error:
            raise ConfigError(f"{path}: the key cannot be read ({error.strerror})") from error
        state = found.st_mtime_ns, found.st_size, found.st_ino
        if known is None or known[0] != state:
            known = self._read[path.name] = state, signing.read_public(path)
        return known[1]


def _names(folder: Path) -> list[str]:
    """Return the names of the sites that have a key, in order."""
    if not folder.is_dir():
        return []
    return sorted(name.removesuffix(SUFFIX) for name in os.listdir(folder) if name.endswith(SUFFIX))
