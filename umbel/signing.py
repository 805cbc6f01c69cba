"""`sign`, `verify`: Ed25519 signatures (RFC 8032) of manifests and orders by the centre, of statements by the sites.

Each site holds the centre's public key, and the centre the public key of each site. Manifests, orders and statements
contain weights by their digest. Keys are PEM files as `openssl genpkey -algorithm ed25519` and `openssl pkey -pubout`
write them. A signature is 128 hexadecimal digits, and travels beside the document.
"""

import json
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from umbel.adapter import AdapterManifest
from umbel.base.origin import ORIGIN, BaseOrigin
from umbel.errors import AdapterError, ConfigError
from umbel.messages import Submit
from umbel.statements import HelloStatement, UpdateStatement, VerdictStatement

PrivateKey = Ed25519PrivateKey
PublicKey = Ed25519PublicKey
Signed = AdapterManifest | Submit | UpdateStatement | HelloStatement | VerdictStatement | BaseOrigin


@dataclass(frozen=True)
class _Kind:
    """One kind of signed document, with the messages for a signature that is missing or wrong."""

    context: bytes
    """Prefix of the signed bytes, so that a signature of one kind of document is never valid for another."""
    missing: str
    wrong: str


CONTEXT = b"umbel adapter manifest 1\n"
_BY_THE_CENTRE = "it is not signed; the centre signs with `signing-key` in its run configuration"
_KINDS: dict[type[Signed], _Kind] = {
    AdapterManifest: _Kind(
        CONTEXT, _BY_THE_CENTRE,
        "its signature is not by the trusted key, or its manifest was changed; compare the public key with the "
        "centre's",
    ),
    Submit: _Kind(
        b"umbel round order 1\n", _BY_THE_CENTRE,
        "its signature is not by the trusted key, or the order was changed; compare the public key with the centre's",
    ),
    UpdateStatement: _Kind(
        b"umbel update statement 1\n", "the update is not signed; the site signs with `[site].signing_key`",
        "the update's signature is not by this site's key, or is for another order, update or counts; compare the "
        "public key with the site's",
    ),
    HelloStatement: _Kind(
        b"umbel hello statement 1\n", "the hello is not signed; the site signs with `[site].signing_key`",
        "the hello's signature is not by this site's key, or is for another question or another hello; compare the "
        "public key with the site's",
    ),
    BaseOrigin: _Kind(
        b"umbel base origin 1\n", "it is not signed; `umbel base pack --signing-key` signs",
        "its signature is not by the trusted key, or the file was changed; compare the public key with the centre's",
    ),
    VerdictStatement: _Kind(
        b"umbel verdict statement 1\n", "the verdict is not signed; the site signs with `[site].signing_key`",
        "the verdict's signature is not by this site's key, or is for another question, version, registry or report; "
        "compare the public key with the site's",
    ),
}  # fmt: skip


def canonical(document: Signed) -> bytes:
    """Return the signed bytes: JSON with sorted keys and no spaces, without the signature and fields at their defaults.

    Defaults are left out so that signatures stay valid when a later release adds a field.
    """
    defaults = {
        name: field.get_default(call_default_factory=True) for name, field in type(document).model_fields.items()
    }
    fields = json.loads(document.model_dump_json(exclude={"signature"}))
    changed = {name: value for name, value in fields.items() if getattr(document, name) != defaults[name]}
    plain = json.dumps(changed, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return _kind(document).context + plain.encode()


def sign(key: PrivateKey, document: Signed) -> str:
    """Return the signature of a document, as 128 hexadecimal digits."""
    return key.sign(canonical(document)).hex()


def verify(key: PublicKey, document: Signed, signature: str) -> None:
    """Raise AdapterError unless `signature` is of this document and was made with the private half of `key`."""
    what = _subject(document)
    if not signature:
        raise AdapterError(f"{what}: {_kind(document).missing}")
    try:
        key.verify(bytes.fromhex(signature), canonical(document))
    except (InvalidSignature, ValueError) as error:
        raise AdapterError(f"{what}: {_kind(document).wrong}") from error


def _subject(document: Signed) -> str:
    """Name what a document is about, for messages."""
    match document:
        case AdapterManifest():
            return str(document.ref)
        case BaseOrigin():
            return ORIGIN
        case HelloStatement():
            return f"site {document.hello.site}"
        case VerdictStatement():
            return document.report.ref
        case _:
            return f"round {document.order.key}"


def _kind(document: Signed) -> _Kind:
    return next(kind for of, kind in _KINDS.items() if isinstance(document, of))


def read_private(path: Path) -> PrivateKey:
    """Read a private key from a PEM file that only its owner can read; raise ConfigError for any other file."""
    key: object = None
    content = _read(path)
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise ConfigError(f"{path}: others can read the private key; chmod 600 {path}")
    # These are raised for a file without a key, a key with a passphrase, and a key of an unknown kind.
    with suppress(ValueError, TypeError, UnsupportedAlgorithm):
        key = load_pem_private_key(content, password=None)
    if not isinstance(key, PrivateKey):
        raise ConfigError(
            f"{path}: not an Ed25519 private key (PEM, no passphrase); `openssl genpkey -algorithm ed25519` makes one"
        )
    return key


def read_public(path: Path) -> PublicKey:
    """Read the public key that verifies signatures from a PEM file; raise ConfigError for any other file."""
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
