"""`Orders`: ties an order to this registry, run and round, and an update to the site that was given the order.

An order is sent again after every loss, restart and take-over, and a site recognises it only if every byte is the same.
So the nonce is not random: it is an HMAC (RFC 2104) of the order, with a key that belongs to the registry.
"""

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from server.config import RunConfig
from server.dialogues import SiteFailure
from server.registry.registry import AdapterRegistry
from umbel import secret_file, signing
from umbel.errors import ConfigError, RegistryError, UmbelError
from umbel.messages import RoundOrder, RoundReport, Submit, UpdateStatement
from umbel.signing import PublicKey

NONCE_KEY = "nonce.key"
"""Name of the key's file in the registry's directory."""
NONCE_KEY_BYTES = 32


class Orders:
    """Makes a run's orders, signs them, and checks updates against them and against the keys in `site-keys`.

    Raises ConfigError when `site-keys` is not a folder of public keys. A key that is put there later counts at once.
    """

    def __init__(self, config: RunConfig, registry: AdapterRegistry) -> None:
        self._adapter = config.adapter
        self._registry = registry
        self._run = hashlib.sha256(config.plan.model_dump_json().encode()).hexdigest()
        self._site_keys = config.site_keys
        if self._site_keys is not None:
            names = _names(self._site_keys)
            if not names:
                raise ConfigError(f"{self._site_keys}: no NAME.pub here; scripts/make_certs writes a folder of them")
            for path in names.values():
                signing.read_public(path)

    def complete(self, order: RoundOrder) -> RoundOrder:
        """Return the order with its run and nonce; the same order always gets the same nonce."""
        bound = order.model_copy(update={"run": self._run, "nonce": ""})
        secret = _nonce_key(self._registry.root / NONCE_KEY)
        said = f"{self._adapter}\n{bound.model_dump_json()}".encode()
        return bound.model_copy(update={"nonce": hmac.digest(secret, said, "sha256").hex()})

    def signed(self, order: RoundOrder) -> Submit:
        """Return the order as it travels, signed if the registry has a key."""
        submit = Submit(adapter=self._adapter, order=order)
        return submit.model_copy(update={"signature": self._registry.sign(submit)})

    def require_key(self, site: str) -> None:
        """Raise ConfigError for a site that has no key, when `site-keys` requires one."""
        if self._site_keys is not None:
            self._key_of(site, self._site_keys)

    def require(self, site: str, order: RoundOrder, report: RoundReport) -> None:
        """Raise SiteFailure unless the report of the update is signed by the site, for this order."""
        if self._site_keys is None:
            return
        if report.update is None:
            raise SiteFailure(f"round {order.key}: it does not say which update it signed")
        try:
            key = self._key_of(site, self._site_keys)
            signing.verify(key, UpdateStatement.of(site, order, report), report.signature)
        except UmbelError as refusal:
            raise SiteFailure(str(refusal)) from refusal

    def _key_of(self, site: str, folder: Path) -> PublicKey:
        path = _names(folder).get(site)  # looked up in a listing: a site's name never becomes a path
        if path is None:
            raise ConfigError(f"{site} has no key in {folder}; put its public one there, as {site}.pub")
        return signing.read_public(path)


def _names(folder: Path) -> dict[str, Path]:
    """Site → its key file."""
    return {path.name.removesuffix(".pub"): path for path in folder.glob("*.pub")}


def _nonce_key(path: Path) -> bytes:
    """Return the registry's key for nonces, made with the first order; raise RegistryError for a damaged one."""
    if not path.exists():
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with open(temporary, "wb", opener=secret_file.opener) as file:
            file.write(secrets.token_bytes(NONCE_KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    key = path.read_bytes()
    if len(key) != NONCE_KEY_BYTES:
        raise RegistryError(f"{path}: has {len(key)} bytes, not {NONCE_KEY_BYTES}; remove it, and a new one is made")
    return key
