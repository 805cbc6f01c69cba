"""Who made a version: Ed25519 signatures of manifests. The weights are in a manifest by their digest.

The centre signs with a private key, each site holds the public one; both are PEM files as `openssl genpkey -algorithm
ed25519` and `openssl pkey -pubout` write them. A signature is 128 hexadecimal digits, and travels beside the manifest.
"""

import json
import stat
from contextlib import suppress
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from umbel.adapter import AdapterManifest
from umbel.errors import AdapterError, ConfigError

PrivateKey = Ed25519PrivateKey
PublicKey = Ed25519PublicKey
CONTEXT = b"umbel adapter manifest 1\n"
"""Begins what is signed, so that nothing else signed with the same key can pass for a manifest."""


def canonical(manifest: AdapterManifest) -> bytes:
    """What is signed: JSON, keys sorted, no spaces, without fields that are at their defaults.

    The defaults are left out so that a field which a later release adds leaves the signatures of earlier ones valid.
    """
    defaults = {
        name: field.get_default(call_default_factory=True) for name, field in type(manifest).model_fields.items()
    }
    fields = json.loads(manifest.model_dump_json())
    told = {name: value for name, value in fields.items() if getattr(manifest, name) != defaults[name]}
    return CONTEXT + json.dumps(told, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def sign(key: PrivateKey, manifest: AdapterManifest) -> str:
    """The signature of a manifest."""
    return key.sign(canonical(manifest)).hex()


def verify(key: PublicKey, manifest: AdapterManifest, signature: str) -> None:
    """Raise AdapterError unless `signature` is one of this manifest, made with the private half of `key`."""
    if not signature:
        raise AdapterError(
            f"{manifest.ref}: it is not signed; the centre signs with `signing-key` in its run configuration"
        )
    try:
        key.verify(bytes.fromhex(signature), canonical(manifest))
    except (InvalidSignature, ValueError) as error:
        raise AdapterError(
            f"{manifest.ref}: its signature is not by the trusted key, or its manifest was changed; compare the public "
            "key with the centre's"
        ) from error


def read_private(path: Path) -> PrivateKey:
    """The centre's key, from a PEM file that only its owner can read; raise ConfigError for any other file."""
    key: object = None
    content = _read(path)
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise ConfigError(f"{path}: others can read the private key; chmod 600 {path}")
    with suppress(ValueError, TypeError, UnsupportedAlgorithm):  # no key, one with a passphrase, of an unknown kind
        key = load_pem_private_key(content, password=None)
    if not isinstance(key, PrivateKey):
        raise ConfigError(
            f"{path}: not an Ed25519 private key (PEM, no passphrase); `openssl genpkey -algorithm ed25519` makes one"
        )
    return key


def read_public(path: Path) -> PublicKey:
    """The key that signatures are held against, from a PEM file; raise ConfigError for any other file."""
    key: object = None
    content = _read(path)
    with suppress(ValueError, UnsupportedAlgorithm):
        key = load_pem_public_key(content)
    if not isinstance(key, PublicKey):
        raise ConfigError(
            f"{path}: not an Ed25519 public key (PEM); `openssl pkey -pubout -in PRIVATE_KEY` makes it of the private "
            "one"
        )
    return key


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: the key cannot be read ({error.strerror})") from error
