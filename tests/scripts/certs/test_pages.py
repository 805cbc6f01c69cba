"""The pages of make_certs: addresses and ports in their commands, files that are there, and a site file that loads."""

import re
from pathlib import Path

import pytest

from scripts.tools.certs import make as make_certs
from scripts.tools.certs.pages import CA_PAGE, centre_page, proxy_file, site_file, site_page
from umbel.site.config import SiteConfig

HOSTS = [
    ("centre.example.org", "centre.example.org:9443"),
    ("192.0.2.7", "192.0.2.7:9443"),
    ("2001:db8::7", "[2001:db8::7]:9443"),
]


@pytest.mark.parametrize(("host", "address"), HOSTS)
def test_sites_are_told_the_proxys_address(host: str, address: str) -> None:
    assert f"--superlink {address} --root-certificates ca.crt" in site_page("clinic-a", host, 9443)
    assert address in centre_page(host, 9443)


def test_the_proxy_listens_where_sites_are_sent() -> None:
    assert "listen 9443 ssl;" in proxy_file(9443)
    assert proxy_file(9443).count("{") == proxy_file(9443).count("}")


def test_every_file_that_a_page_names_is_beside_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make_certs.make(out, "centre.example.org", ["clinic-a"], 1, 8443)
    for folder in (out / "centre", out / "site-clinic-a"):
        page = (folder / "README.md").read_text()
        plain = page.replace("$PWD/", "").replace("%s/", "")
        named = {*re.findall(r"[\w./-]+\.(?:crt|key|pub|secret|conf)\b", plain)}
        assert len(named) >= 2
        missing = {name for name in named if not (folder / name.replace("SITE", "clinic-a")).exists()}
        assert not missing, folder.name
    assert "scripts/make_certs OUT --renew" in CA_PAGE


def test_the_site_file_loads_and_asks_for_signatures(tmp_path: Path) -> None:
    file = tmp_path / "site.toml"
    file.write_text(site_file("clinic-a"))
    config = SiteConfig.load(file)
    assert (config.site.name, config.training.data) == ("clinic-a", tmp_path / "private" / "train.jsonl")
    assert (config.site.trusted_key, config.site.signing_key) == (
        tmp_path / "centre-signing.pub", tmp_path / "updates.key",
    )  # fmt: skip
