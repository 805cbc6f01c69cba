"""Makes a federation's keys and certificates: a folder for the centre, one per site, and the CA's, which goes offline.

    scripts/make_certs OUT --centre HOST --sites a b c      # OUT must be new
    scripts/make_certs OUT --add d e                        # more sites; OUT/ca is not needed
    scripts/make_certs OUT --renew                          # another certificate for the SuperLink, before one expires

Private keys are readable by their owner only, and nothing is ever overwritten but the certificate that is renewed.
"""

import argparse
import ipaddress
import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NoReturn, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from scripts.tools.certs.pages import CA_PAGE, centre_page, proxy_file, site_file, site_page

CA_DAYS = 3650
DAYS = 730
"""Days for which the SuperLink's certificate is valid by default."""
PORT = 8443
SKEW = timedelta(hours=1)
"""Certificates are valid from this long before they are made, because clocks differ."""
HERE = ("localhost", "127.0.0.1")
"""Names by which the centre itself, and a proxy before it, reach the SuperLink."""
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_SITE = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"


@dataclass(frozen=True)
class Authority:
    """The federation's own CA. Sites trust no other one, and it signs SuperLinks only."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @classmethod
    def make(cls) -> Self:
        """Make a new CA, valid for `CA_DAYS`."""
        key = ec.generate_private_key(ec.SECP384R1())
        name = _name("umbel CA")
        builder = _builder(key.public_key(), name, name, datetime.now(UTC) + timedelta(days=CA_DAYS))
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(_usage(ca=True), critical=True)
        return cls(key, builder.sign(key, hashes.SHA384()))

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the CA from a folder that `make_certs` wrote; end with a message if its key is not there."""
        if not (folder / "ca.key").is_file():
            refuse(f"{folder / 'ca.key'} is not there; bring the CA's folder back for this")
        key = load_pem_private_key((folder / "ca.key").read_bytes(), password=None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return cls(key, x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes()))

    def issue(self, key: ec.EllipticCurvePublicKey, names: x509.SubjectAlternativeName, days: int) -> x509.Certificate:
        """Issue a server's certificate for `days`, but no longer than the CA's own."""
        until = min(datetime.now(UTC) + timedelta(days=days), self.certificate.not_valid_after_utc)
        builder = _builder(key, _name("umbel SuperLink"), self.certificate.subject, until)
        builder = builder.add_extension(names, critical=False)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_usage(ca=False), critical=True)
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        own = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        return builder.add_extension(own, critical=False).sign(self.key, hashes.SHA384())


def main(arguments: list[str] | None = None) -> None:
    """Run the command; end with a message and status 1 where something is refused."""
    parser = _options()
    options = parser.parse_args(arguments)
    if options.sites and not options.centre:
        parser.error("--sites goes with --centre; --add names the sites to add")
    out: Path = options.out
    if options.renew:
        print(renew(out, options.days))
    elif options.add:
        for site in add(out, options.add, options.port):
            print(f"{site}: to the site, over a safe way; register its key as {out / 'centre' / 'README.md'} says")
    else:
        make(out, options.centre, options.sites, options.days, options.port or PORT)
        print(f"{out}: take ca/ offline, leave centre/ here, bring each site-*/ to its site; each has a README.md")


def make(out: Path, host: str, sites: list[str], days: int, port: int) -> None:
    """Write the whole folder, or nothing: a folder that holds something, or a wrong name, is refused."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        refuse(f"{out} is there already; --add puts a site into it, --renew makes the SuperLink's certificate anew")
    names = x509.SubjectAlternativeName([general_name(one) for one in dict.fromkeys((host, *HERE))])
    _require_names(sites)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(mode=0o700, parents=True)
        _write_centre(temporary, names, host, days, port)
        for site in sites:
            _write_site(temporary, site, host, port)
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def add(out: Path, sites: list[str], port: int | None) -> list[Path]:
    """Write folders for more sites; return their paths. This needs no private key of the CA or the centre."""
    certificate = _superlink(out)
    _require_names(sites)
    there = [site for site in sites if any(path.exists() for path in _traces(out, site))]
    if there:
        refuse(f"{out} has {', '.join(there)} already; for new keys remove its folder, and its .pub files in centre/")
    host = _host(certificate)
    port = port or int((out / "centre" / "port").read_text())
    return [_write_site(out, site, host, port) for site in sites]


def renew(out: Path, days: int) -> Path:
    """Replace the SuperLink's certificate by one for the same names and key, which counts once it is restarted."""
    old = _superlink(out)
    key = old.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    names = old.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    path = out / "centre" / "superlink.crt"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    _write(temporary, Authority.read(out / "ca").issue(key, names, days).public_bytes(Encoding.PEM))
    os.replace(temporary, path)
    return path


def general_name(host: str) -> x509.GeneralName:
    """Return a DNS name or an IP address in a certificate's form; end with a message if `host` is neither."""
    with suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(host))
    if not re.fullmatch(rf"(?:{_LABEL}\.)*(?!\d+$){_LABEL}", host) or len(host) > 253:
        refuse(f"{host!r} is neither a host's name nor an IP address; no scheme, no port")
    return x509.DNSName(host)


def refuse(why: str) -> NoReturn:
    """End the command with a message and status 1."""
    raise SystemExit(f"make_certs: {why}")


def _write_centre(out: Path, names: x509.SubjectAlternativeName, host: str, days: int, port: int) -> None:
    ca, centre = out / "ca", out / "centre"
    for folder in (ca, centre, centre / "supernodes", centre / "sites"):
        folder.mkdir(mode=0o700)
    authority, key, signing = Authority.make(), ec.generate_private_key(ec.SECP256R1()), Ed25519PrivateKey.generate()
    root = authority.certificate.public_bytes(Encoding.PEM)
    _write(ca / "ca.key", _pem(authority.key), private=True)
    _write(ca / "ca.crt", root)
    _write(ca / "README.md", CA_PAGE.encode())
    _write(centre / "ca.crt", root)
    _write(centre / "superlink.key", _pem(key), private=True)
    _write(centre / "superlink.crt", authority.issue(key.public_key(), names, days).public_bytes(Encoding.PEM))
    _write(centre / "port", f"{port}\n".encode())
    _write(centre / "superexec.secret", os.urandom(32), private=True)
    _write(centre / "signing.key", _pem(signing), private=True)
    _write(centre / "signing.pub", _public_pem(signing))
    _write(centre / "nginx.conf", proxy_file(port).encode())
    _write(centre / "README.md", centre_page(host, port).encode())


def _write_site(out: Path, site: str, host: str, port: int) -> Path:
    """Write a site's folder, whole or not at all, then its public keys at the centre; return the folder."""
    folder, temporary = out / f"site-{site}", out / f".site-{site}.{os.getpid()}.tmp"
    updates = Ed25519PrivateKey.generate()
    key = ec.generate_private_key(ec.SECP384R1())  # Flower takes NIST curves in OpenSSH's format
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + f" {site}\n".encode()
    try:
        temporary.mkdir(mode=0o700)
        _write(temporary / "supernode.key", _openssh(key), private=True)
        _write(temporary / "supernode.pub", public)
        _write(temporary / "updates.key", _pem(updates), private=True)
        _write(temporary / "updates.pub", _public_pem(updates))
        _write(temporary / "ca.crt", (out / "centre" / "ca.crt").read_bytes())
        _write(temporary / "centre-signing.pub", (out / "centre" / "signing.pub").read_bytes())
        _write(temporary / "site.toml", site_file(site).encode())
        _write(temporary / "README.md", site_page(site, host, port).encode())
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _write(_public_key(out, site), public)
    (out / "centre" / "sites").mkdir(mode=0o700, exist_ok=True)  # there is none in a folder of an earlier release
    _write(_update_key(out, site), _public_pem(updates))
    return folder


def _write(path: Path, content: bytes, *, private: bool = False) -> None:
    """Write a new file; a private one is at no time readable by anybody but its owner."""
    with open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600 if private else 0o644)) as file:
        file.write(content)


def _public_key(out: Path, site: str) -> Path:
    return out / "centre" / "supernodes" / f"{site}.pub"


def _update_key(out: Path, site: str) -> Path:
    return out / "centre" / "sites" / f"{site}.pub"


def _traces(out: Path, site: str) -> list[Path]:
    """Return the paths that exist if the site was made before."""
    return [out / f"site-{site}", _public_key(out, site), _update_key(out, site)]


def _superlink(out: Path) -> x509.Certificate:
    path = out / "centre" / "superlink.crt"
    if not path.is_file():
        refuse(f"{path} is not there; {out} is no folder of make_certs")
    return x509.load_pem_x509_certificate(path.read_bytes())


def _host(certificate: x509.Certificate) -> str:
    """Return the name by which the sites reach the SuperLink: the first one in its certificate."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return str(next(iter(names)).value)


def _require_names(sites: list[str]) -> None:
    wrong = [site for site in sites if not re.fullmatch(_SITE, site)]
    if wrong:
        refuse(f"{wrong[0]!r} cannot name a site: a letter or digit, then at most 63 of them, '.', '_' and '-'")
    if len(set(sites)) < len(sites):
        refuse(f"{', '.join(sites)}: each site needs a name of its own")


def _builder(
    key: ec.EllipticCurvePublicKey, subject: x509.Name, issuer: x509.Name, until: datetime
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder(issuer, subject, key, x509.random_serial_number())
    builder = builder.not_valid_before(datetime.now(UTC) - SKEW).not_valid_after(until)
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca, key_cert_sign=ca, crl_sign=ca, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _pem(key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _public_pem(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _openssh(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("make_certs", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--centre", metavar="HOST", help="name or IP address by which the sites reach the SuperLink")
    what.add_argument("--add", nargs="+", metavar="SITE", help="sites to add to a folder that is there")
    what.add_argument("--renew", action="store_true", help="the SuperLink's certificate, for the same names and key")
    parser.add_argument("--sites", nargs="+", default=[], metavar="SITE", help="their names, as in the site files")
    parser.add_argument(
        "--days", type=_days, default=DAYS, help=f"how long the SuperLink's certificate is valid ({DAYS})"
    )
    parser.add_argument("--port", type=int, help=f"its port, for the pages ({PORT}; with --add: as before)")
    return parser


def _days(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= CA_DAYS:
        raise argparse.ArgumentTypeError(f"{text} is not within 1..{CA_DAYS}, the days for which the CA is valid")
    return int(text)


if __name__ == "__main__":
    main()
