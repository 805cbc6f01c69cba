"""`Orders`: ties an order to this registry, run and round, and an update to the site that was given the order.

An order is sent again after every loss, restart and take-over, and a site recognises it only if every byte is the same.
So the nonce is not random: it is an HMAC (RFC 2104) of the order, with a key that belongs to the registry.
"""

import hashlib
import hmac
import os
import secrets
from contextlib import suppress
from pathlib import Path

from server.config import RunConfig
from server.dialogues import SiteFailure
from server.keyring import Keyring
from server.registry.registry import AdapterRegistry
from umbel import peft_dir, secret_file
from umbel.errors import RegistryError, UmbelError
from umbel.messages import JobState, RoundOrder, RoundReport, Submit
from umbel.statements import UpdateStatement

NONCE_KEY = "nonce.key"
"""Name of the key's file in the registry's directory."""
NONCE_KEY_BYTES = 32


class Orders:
    """Makes a run's orders, signs them, and checks updates against them and against the sites' keys."""

    def __init__(self, config: RunConfig, registry: AdapterRegistry, keys: Keyring) -> None:
        self._adapter = config.adapter
        self._registry = registry
        self._run = hashlib.sha256(config.plan.model_dump_json().encode()).hexdigest()
        self._signed = config.site_keys is not None
        self._keys = keys

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

    def require(self, site: str, order: RoundOrder, report: RoundReport) -> None:
        """Raise SiteFailure unless the site signed its report for this order: of an update, or of a skipped round."""
        if self._signed and report.update is None and report.state is not JobState.SKIPPED:
            raise SiteFailure(f"round {order.key}: it does not say which update it signed")
        try:
            self._keys.require(site, UpdateStatement.of(site, order, report), report.signature)
        except UmbelError as refusal:
            raise SiteFailure(str(refusal)) from refusal


def _nonce_key(path: Path) -> bytes:
    """Return the registry's key for nonces, made with the first order; raise RegistryError for a damaged one."""
    if not path.exists():
        temporary = path.with_name(f".{path.name}.{secrets.randbits(63)}.tmp")
        with open(temporary, "wb", opener=secret_file.opener) as file:
            file.write(secrets.token_bytes(NONCE_KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):  # another run has made it meanwhile, and uses it already
            os.link(temporary, path)
        temporary.unlink()
        peft_dir.sync_directory(path.parent)
    key = path.read_bytes()
    if len(key) != NONCE_KEY_BYTES:
        raise RegistryError(f"{path}: has {len(key)} bytes, not {NONCE_KEY_BYTES}; remove it, and a new one is made")
    return key
