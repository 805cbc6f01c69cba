"""`umbel adapter load` and `unload`, each as a process of its own, against a toy daemon."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.toys.command_line import refusal, umbel
from tests.toys.sites.base_dir import write_base
from tests.toys.sites.socket_server import serve
from umbel.site.template import site_toml

if not importlib.util.find_spec("httpx"):
    pytest.skip("the site's commands need httpx", allow_module_level=True)


class Daemon:
    """Answers as client/control.py does, and remembers what it was asked."""

    nonsense = False

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, dict[str, list[str]]]] = []
        self.listed = False

    def route(self, method: str, path: str, headers: dict[str, str], body: bytes) -> object:
        parts = urlsplit(path)
        self.asked.append((method, parts.path, parse_qs(parts.query)))
        if parts.path == "/served/support":
            return 409, "Conflict"
        said = {"name": "legal", "digest": "0123456789abcdef" * 4, "path": "/srv/legal", "since": 0.0}
        return json.dumps({**said, "listed": self.listed}).encode()


@pytest.fixture
def daemon(sockets: Path) -> Iterator[Daemon]:
    write_base(sockets / "base")
    (sockets / "site.toml").write_text(site_toml())
    (sockets / "state").mkdir()
    made = Daemon()
    server = serve(made, sockets / "state" / "operator.sock")
    yield made
    server.shutdown()
    server.server_close()


def test_a_directory_is_named_by_its_whole_path(daemon: Daemon, sockets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(sockets)
    ended = umbel("adapter", "load", "site.toml", "legal", "a b&c=d")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == "legal@sha256:0123456789abcdef answers users of 'legal'\n"
    assert daemon.asked == [("POST", "/served/legal", {"path": [str(sockets / "a b&c=d")]})]


def test_what_the_next_start_changes_is_said(daemon: Daemon, sockets: Path) -> None:
    daemon.listed = True
    for command in (("load", sockets / "site.toml", "legal", "/srv/other"), ("unload", sockets / "site.toml", "legal")):
        shown = umbel("adapter", *command).stdout
        assert "until the next start: it stands under [[serve]] in the site file" in shown


def test_one_that_is_unloaded_is_said_with_what_it_was(daemon: Daemon, sockets: Path) -> None:
    shown = umbel("adapter", "unload", sockets / "site.toml", "legal").stdout
    assert shown == "legal is not served any more; it was since 1970-01-01 00:00 UTC, from /srv/legal\n"
    assert daemon.asked == [("DELETE", "/served/legal", {})]


def test_a_refusal_is_one_line(daemon: Daemon, sockets: Path) -> None:
    assert "/served/support?path=" in refusal("adapter", "load", sockets / "site.toml", "support", "/srv/legal")
    assert "cannot name an adapter" in refusal("adapter", "load", sockets / "site.toml", "../status", "/srv/legal")
    assert len(daemon.asked) == 1


def test_without_a_daemon_there_is_nothing_to_load_into(sockets: Path) -> None:
    (sockets / "site.toml").write_text(site_toml())
    assert "is `umbel serve` running?" in refusal("adapter", "load", sockets / "site.toml", "legal", "/srv/legal")
