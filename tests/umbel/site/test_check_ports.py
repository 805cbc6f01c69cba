"""The ports of a site: one that another program has is named, unless that is the site's own daemon."""

import fcntl
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.toys.sites.base_dir import write_base
from tests.toys.sites.site_file import GOOD, load
from umbel.errors import ConfigError
from umbel.site.check import check_files, ports_in_use
from umbel.site.config import SiteConfig


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which something listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def site(folder: Path, engine: int, metrics: int | None = None, host: str = "127.0.0.1") -> SiteConfig:
    more = f'[metrics]\nport = {metrics}\nhost = "{host}"' if metrics else ""
    text = GOOD.format(engine="", training="", more=more).replace("port = 30000", f"port = {engine}")
    return load(folder, text)


def test_a_port_that_another_program_has_is_named(tmp_path: Path, taken: int) -> None:
    why = "(Address already in use); stop what listens there or choose another port"
    assert ports_in_use(site(tmp_path, free_port(), free_port())) == []
    assert [str(error) for error in ports_in_use(site(tmp_path, taken, taken))] == [
        f"[engine].port: 127.0.0.1:{taken} cannot be used {why}",
        f"[metrics].port: 127.0.0.1:{taken} cannot be used {why}",
    ]
    assert not (tmp_path / "state").exists(), "checking makes nothing"


def test_the_sites_own_daemon_is_no_mistake(tmp_path: Path, taken: int) -> None:
    config = site(tmp_path, taken)
    (tmp_path / "state").mkdir()
    with (tmp_path / "state" / "lock").open("w") as lock:
        assert len(ports_in_use(config)) == 1, "a daemon was here once"
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert ports_in_use(config) == []
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert len(ports_in_use(config)) == 1
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # asking has left it free


@pytest.mark.parametrize(("host", "fine"), [("127.0.0.1", False), ("0.0.0.0", False), ("127.0.0.2", True)])
def test_one_port_for_the_engine_and_the_metrics_is_refused(tmp_path: Path, host: str, fine: bool) -> None:
    write_base(tmp_path / "base")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "train.jsonl").write_text("{}")
    config = site(tmp_path, 30000, 30000, host)
    if fine:
        check_files(config)
    else:
        with pytest.raises(ConfigError, match=r"^\[metrics\]\.port: 30000 is the port of \[engine\], too; choose"):
            check_files(config)
