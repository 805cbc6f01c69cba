"""The files of make_certs: certificates that a TLS handshake takes, keys that Flower reads, files that stay private."""

import re
import shutil
import ssl
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from scripts.tools.certs import make as make_certs
from umbel import signing
from umbel.adapter import AdapterManifest
from umbel.errors import AdapterError
from umbel.messages import JobState, RoundOrder, RoundReport, TrainPlan
from umbel.site.config import SiteConfig
from umbel.statements import UpdateStatement

HOST = "centre.example.org"
MANIFEST = AdapterManifest(
    name="support", version=1, digest="0" * 64, base="1" * 64, lineage="l", round=1, rank=8, target_modules=("q_proj",)
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation's folder, to be read only."""
    return make(tmp_path_factory.mktemp("certs") / "out", "clinic-a", "clinic-b")


def make(out: Path, *sites: str, host: str = HOST, days: int = 90) -> Path:
    make_certs.main([str(out), "--centre", host, "--sites", *sites, "--days", str(days)])
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def handshake(centre: Path, ca: Path, host: str) -> None:
    """Do the TLS handshake of a SuperNode and the SuperLink; raise ssl.SSLError where it fails."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(centre / "superlink.crt", centre / "superlink.key")
    client = ssl.create_default_context(cafile=ca)
    client.verify_flags |= ssl.VERIFY_X509_STRICT  # the default from Python 3.13 on
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(back, there, server_hostname=host), server.wrap_bio(there, back, server_side=True)]
    for end in 2 * ends:
        with suppress(ssl.SSLWantReadError):
            end.do_handshake()
    assert ends[0].version() == ends[1].version() == "TLSv1.3"


@pytest.mark.parametrize("host", [HOST, "localhost", "127.0.0.1"])
def test_a_site_takes_the_superlinks_certificate(made: Path, host: str) -> None:
    handshake(made / "centre", made / "site-clinic-a" / "ca.crt", host)


@pytest.mark.parametrize("host", ["10.1.2.3", "fd00::1", "superlink"])
def test_the_centre_may_be_an_address(tmp_path: Path, host: str) -> None:
    out = make(tmp_path / "out", "a", host=host)
    handshake(out / "centre", out / "site-a" / "ca.crt", host)
    where = f"--superlink {'[fd00::1]' if ':' in host else host}:8443 "
    assert where in (out / "site-a" / "README.md").read_text()


def test_another_host_or_another_ca_is_refused(made: Path, tmp_path: Path) -> None:
    other = make(tmp_path / "other", "clinic-a")
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(made / "centre", made / "ca" / "ca.crt", "elsewhere.example.org")
    with pytest.raises(ssl.SSLCertVerificationError, match="certificate verify failed"):
        handshake(made / "centre", other / "site-clinic-a" / "ca.crt", HOST)


def test_a_superlinks_certificate_signs_nothing(made: Path) -> None:
    certificate = x509.load_pem_x509_certificate((made / "centre" / "superlink.crt").read_bytes())
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not certificate.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign


def test_it_is_valid_for_as_long_as_was_said(made: Path) -> None:
    certificate = x509.load_pem_x509_certificate((made / "centre" / "superlink.crt").read_bytes())
    ca = x509.load_pem_x509_certificate((made / "ca" / "ca.crt").read_bytes())
    for one, days in ((certificate, 90), (ca, make_certs.CA_DAYS)):
        assert one.not_valid_before_utc < datetime.now(UTC)
        assert timedelta(0) <= datetime.now(UTC) + timedelta(days=days) - one.not_valid_after_utc < timedelta(hours=1)


def test_only_the_owner_reads_keys_and_each_lies_where_it_is_needed(made: Path) -> None:
    folders = [made, *(path for path in made.rglob("*") if path.is_dir())]
    assert {path.stat().st_mode & 0o777 for path in folders} == {0o700}
    private = {"ca/ca.key", "centre/superlink.key", "centre/signing.key", "centre/superexec.secret",
               "site-clinic-a/supernode.key", "site-clinic-b/supernode.key",
               "site-clinic-a/updates.key", "site-clinic-b/updates.key"}  # fmt: skip
    modes = {name: (made / name).stat().st_mode & 0o777 for name in files(made)}
    assert {name for name, mode in modes.items() if mode == 0o600} == private
    assert {mode for name, mode in modes.items() if name not in private} == {0o644}
    secrets = {name for name, content in files(made).items() if b"PRIVATE KEY" in content}
    assert secrets == private - {"centre/superexec.secret"}
    assert len({files(made)[name] for name in private}) == len(private)


def test_a_supernodes_key_is_one_that_flower_takes_and_the_centre_has_its_public_half(made: Path) -> None:
    for site in ("clinic-a", "clinic-b"):
        key = load_ssh_private_key((made / f"site-{site}" / "supernode.key").read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        assert key.curve.name == "secp384r1"
        public = (made / "centre" / "supernodes" / f"{site}.pub").read_bytes()
        assert load_ssh_public_key(public) == key.public_key()
        assert public == (made / f"site-{site}" / "supernode.pub").read_bytes()


def test_a_site_file_is_one_that_loads_and_trusts_what_the_centre_signs(made: Path) -> None:
    config = SiteConfig.load(made / "site-clinic-b" / "site.toml")
    assert config.site.name == "clinic-b"
    assert config.site.trusted_key == made / "site-clinic-b" / "centre-signing.pub"
    signature = signing.sign(signing.read_private(made / "centre" / "signing.key"), MANIFEST)
    signing.verify(signing.read_public(config.site.trusted_key), MANIFEST, signature)
    signing.verify(signing.read_public(made / "centre" / "signing.pub"), MANIFEST, signature)


def test_each_site_signs_its_updates_with_a_key_that_the_centre_has_under_its_name(made: Path) -> None:
    order = RoundOrder(key="k", base="b", parent="p", round=1, plan=TrainPlan(rank=1, steps=1, seconds=1.0))
    report = RoundReport(key="k", state=JobState.DONE, parent="p", update="u")
    public = {site: signing.read_public(made / "centre" / "sites" / f"{site}.pub") for site in ("clinic-a", "clinic-b")}
    for site, other in (("clinic-a", "clinic-b"), ("clinic-b", "clinic-a")):
        section = SiteConfig.load(made / f"site-{site}" / "site.toml").site
        assert section.signing_key == made / f"site-{site}" / "updates.key"
        statement = UpdateStatement.of(site, order, report)
        signature = signing.sign(signing.read_private(section.signing_key), statement)
        signing.verify(public[site], statement, signature)
        with pytest.raises(AdapterError):
            signing.verify(public[other], statement, signature)


def test_the_proxy_publishes_the_fleet_api_and_nothing_else(made: Path) -> None:
    """tests/e2e/centre/test_secure.py tries it with nginx, where that is installed."""
    conf = (made / "centre" / "nginx.conf").read_text()
    locations = dict(re.findall(r"location (\S+) \{(.*?)\}", conf, flags=re.DOTALL))
    assert locations.keys() == {"/v1/fleet/", "/"}
    assert locations["/"].strip() == "return 404;"
    assert re.findall(r"proxy_pass (\S+);", conf) == ["https://127.0.0.1:8000/v1/fleet/"]
    assert re.findall(r"listen (.+);", conf) == ["8443 ssl"]
    paths = re.findall(r"(?:_path|_key|_certificate|pid) (\S+);", conf)
    assert len(paths) >= 6
    assert not [path for path in paths if "/" in path], "all relative to the folder"


@pytest.mark.parametrize("folder", ["centre", "site-clinic-a"])
def test_the_files_that_a_page_names_are_there(made: Path, folder: str) -> None:
    page = (made / folder / "README.md").read_text().replace("supernodes/SITE.pub", "supernodes/clinic-a.pub")
    named = set(re.findall(r"(?:supernodes/)?\b[\w-]+\.(?:crt|key|pub|secret|conf)\b", page)) | {"README.md"}
    assert len(named) >= 4
    assert all((made / folder / name).is_file() for name in named), named


def test_nothing_is_overwritten(made: Path) -> None:
    before = files(made)
    for arguments in (["--centre", HOST, "--sites", "x"], ["--add", "clinic-c", "clinic-a"]):
        with pytest.raises(SystemExit, match=r"^make_certs: .+(is there already|has clinic-a already)"):
            make_certs.main([str(made), *arguments])
        assert files(made) == before


def test_a_site_is_added_without_any_key_of_the_centres(tmp_path: Path) -> None:
    out = make(tmp_path / "out", "a")
    for name in ("ca/ca.key", "centre/signing.key", "centre/superlink.key"):
        (out / name).unlink()
    (out / "site-a").rename(tmp_path / "brought-to-its-site")
    before = files(out)
    make_certs.main([str(out), "--add", "b", "c"])
    after = files(out)
    assert before.items() <= after.items()
    assert {name.partition("/")[0] for name in after.keys() - before.keys()} == {"centre", "site-b", "site-c"}
    assert after["site-b/ca.crt"] == after["centre/ca.crt"]
    assert after["site-b/centre-signing.pub"] == after["centre/signing.pub"]
    assert after["site-b/supernode.pub"] == after["centre/supernodes/b.pub"]
    assert after["site-b/updates.pub"] == after["centre/sites/b.pub"]
    assert f"{HOST}:8443" in (out / "site-b" / "README.md").read_text()
    (out / "centre" / "port").write_text("9443\n")
    make_certs.main([str(out), "--add", "d"])
    assert f"{HOST}:9443" in (out / "site-d" / "README.md").read_text()
    with pytest.raises(SystemExit, match="has a already"):
        make_certs.main([str(out), "--add", "a"])
    shutil.rmtree(out / "centre" / "sites")  # as an earlier release left it
    make_certs.main([str(out), "--add", "e"])
    assert [path.name for path in (out / "centre" / "sites").iterdir()] == ["e.pub"]


def test_the_certificate_is_renewed_for_the_same_names_and_key(tmp_path: Path) -> None:
    out = make(tmp_path / "out", "a", days=1)
    before = files(out)
    make_certs.main([str(out), "--renew", "--days", "900"])
    after = files(out)
    assert {name for name in after if after[name] != before.get(name)} == {"centre/superlink.crt"}
    handshake(out / "centre", out / "site-a" / "ca.crt", HOST)
    old, new = (x509.load_pem_x509_certificate(one["centre/superlink.crt"]) for one in (before, after))
    assert new.not_valid_after_utc - old.not_valid_after_utc > timedelta(days=898)
    assert new.serial_number != old.serial_number
    make_certs.main([str(out), "--renew", "--days", str(make_certs.CA_DAYS)])
    ca = x509.load_pem_x509_certificate(after["ca/ca.crt"])
    latest = x509.load_pem_x509_certificate((out / "centre" / "superlink.crt").read_bytes())
    assert latest.not_valid_after_utc <= ca.not_valid_after_utc
    (out / "ca" / "ca.key").unlink()
    with pytest.raises(SystemExit, match="bring the CA's folder back"):
        make_certs.main([str(out), "--renew"])


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--centre", "https://c"], "'https://c' is neither a host's name nor an IP address"),
        (["--centre", "c:8000"], "'c:8000' is neither"),
        (["--centre", "10.1.2.300"], "'10.1.2.300' is neither"),
        (["--centre", ""], "'' is neither"),
        (["--centre", "c", "--sites", "a/b"], "'a/b' cannot name a site"),
        (["--centre", "c", "--sites", "../a"], "'../a' cannot name a site"),
        (["--centre", "c", "--sites", "a", "a"], "each site needs a name of its own"),
        (["--add", "a"], "is no folder of make_certs"),
        (["--renew"], "is no folder of make_certs"),
    ],
)
def test_what_makes_no_sense_is_refused_and_leaves_nothing(tmp_path: Path, arguments: list[str], why: str) -> None:
    with pytest.raises(SystemExit, match=re.escape(why)):
        make_certs.main([str(tmp_path / "out"), *arguments])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--add", "a", "--sites", "b"], ["--centre", "c", "--days", "0"], []])
def test_options_that_do_not_go_together_are_refused(tmp_path: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        make_certs.main([str(tmp_path / "out"), *arguments])
    assert ended.value.code == 2
    assert list(tmp_path.iterdir()) == []


def test_what_fails_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> str:
        raise OSError("no space left")

    monkeypatch.setattr(make_certs, "site_page", fails)
    with pytest.raises(OSError, match="no space"):
        make(tmp_path / "out", "a")
    assert list(tmp_path.iterdir()) == []
