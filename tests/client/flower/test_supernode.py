"""The SuperNode's keeper: real processes, whose log is that of a SuperNode."""

import asyncio
import os
import re
import signal
import socket
import sys
from pathlib import Path

import pytest
from flwr.supercore.constant import SUPERNODE_UVICORN_DEFAULT_PORT, UVICORN_DEFAULT_HOST
from flwr.supercore.superexec.run_superexec import _TASK_POLL_INTERVAL_ENV as INTERVAL_S

from client.flower import supernode
from client.flower.supernode import PATIENCE_S, Watch, command, run
from umbel.errors import ConfigError
from umbel.site.config import SiteConfig
from umbel.site.template import site_toml

TAKEN = b"INFO :      Receiving: query.collect message (ID: 5f)\n"
SENT = b"INFO :      Sent successfully\n"

WAITS_ONCE = """
import pathlib, sys, time
runs = pathlib.Path(sys.argv[1])
runs.write_text(runs.read_text() + "x" if runs.exists() else "x")
print("Receiving: query.collect message", flush=True)
if len(runs.read_text()) == 1:
    time.sleep(600)
print("Sent successfully", flush=True)
sys.exit(7)
"""


def test_it_is_stuck_when_a_message_is_in_hand_and_nobody_works_on_it_for_too_long() -> None:
    watch = Watch()
    watch.hear(TAKEN)
    assert not watch.is_stuck(client_app_runs=True, now=0)
    assert not watch.is_stuck(client_app_runs=False, now=10)
    assert not watch.is_stuck(client_app_runs=False, now=10 + PATIENCE_S)
    assert watch.is_stuck(client_app_runs=False, now=11 + PATIENCE_S)


def test_a_working_clientapp_and_an_idle_supernode_have_all_the_time_there_is() -> None:
    watch = Watch()
    for now in range(0, 10_000, 5):
        assert not watch.is_stuck(client_app_runs=False, now=now)
    watch.hear(TAKEN)
    for now in range(0, 10_000, 5):
        assert not watch.is_stuck(client_app_runs=True, now=now)
    watch.hear(SENT)
    for now in range(0, 10_000, 5):
        assert not watch.is_stuck(client_app_runs=False, now=now)


def test_a_clientapp_that_is_seen_again_begins_the_wait_anew() -> None:
    watch = Watch()
    watch.hear(TAKEN)
    assert not watch.is_stuck(client_app_runs=False, now=0)
    assert not watch.is_stuck(client_app_runs=True, now=PATIENCE_S)
    assert not watch.is_stuck(client_app_runs=False, now=PATIENCE_S + 5)


def test_one_that_waits_for_ever_is_started_anew_and_its_own_end_is_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    monkeypatch.setattr(supernode, "PATIENCE_S", 0.0)
    monkeypatch.setattr(supernode, "LOOK_S", 0.1)
    runs = tmp_path / "runs"
    status = asyncio.run(run([sys.executable, "-c", WAITS_ONCE, str(runs)]))
    assert (status, runs.read_text()) == (7, "xx")
    assert capfdbinary.readouterr().out.count(b"Receiving: ") == 2


@pytest.mark.parametrize("set_to", ["", "0.7"])
def test_a_message_reaches_its_clientapp_soon_unless_the_operator_says_otherwise(
    set_to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(INTERVAL_S, raising=False)
    if set_to:
        monkeypatch.setenv(INTERVAL_S, set_to)
    told = tmp_path / "told"
    code = f"import os, pathlib; pathlib.Path({str(told)!r}).write_text(os.environ[{INTERVAL_S!r}])"
    assert asyncio.run(run([sys.executable, "-c", code])) == 0
    assert told.read_text() == (set_to or "0.2")


def test_a_signal_ends_it_with_what_it_started(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    script = f"import os, pathlib, time; pathlib.Path({str(mark)!r}).write_text(str(os.getpid())); time.sleep(600)"

    async def stopped() -> int:
        running = asyncio.create_task(run([sys.executable, "-c", script]))
        while not (mark.exists() and mark.read_text()):
            await asyncio.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        return await running

    assert asyncio.run(stopped()) == -signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)


def test_what_the_operator_wrote_is_passed_on_with_the_sites_socket(
    site_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SiteConfig.load(site_file)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    port = str(free_port())
    written = ["--insecure", "--superlink", "centre:8000", "--port", port, "--max-retries", "3"]
    with pytest.raises(ConfigError, match="belongs to Flower's environment"):
        command(config, written)
    (tmp_path / "flower-supernode").touch()
    assert command(config, written) == [
        str(tmp_path / "python"), "-P", "-m", "client.flower.node", *written,
        "--node-config", f'socket="{config.socket}"',
    ]  # fmt: skip
    joined = [f"--superlink=[::1]:{port}", f"--port={port}"]
    assert command(config, joined)[4:6] == joined
    for own in (["--node-config", "a=1"], ["--node-config=a=1"]):
        with pytest.raises(ConfigError, match="remove it here"):
            command(config, [*written, *own])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "add --superlink HOST:PORT"),
        (["--insecure"], "Flower would join whatever listens on port 8000 of this machine"),
        (["--superlink="], "add --superlink HOST:PORT"),
        (["--superlink"], "expected one argument"),
        (["--superlink", "centre"], "--superlink centre: write HOST:PORT"),
        (["--superlink=https://centre:8000"], "without a URL's prefix"),
    ],
)
def test_a_supernode_that_is_not_told_its_superlink_is_refused(
    site_file: Path, arguments: list[str], says: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        command(SiteConfig.load(site_file), arguments)


def test_a_second_supernode_on_a_machine_is_told_to_take_another_port(site_file: Path) -> None:
    config = SiteConfig.load(site_file)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"127.0.0.1:{port}, .*Address already in use.*add --port {port + 1}"):
            command(config, ["--superlink", "centre:8000", "--port", str(port)])


def test_the_defaults_are_flowers() -> None:
    assert (UVICORN_DEFAULT_HOST, str(SUPERNODE_UVICORN_DEFAULT_PORT)) == (supernode.HOST, supernode.PORT)


def test_without_certificates_and_without_insecure_it_says_whom_flower_will_trust(
    site_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    (tmp_path / "flower-supernode").touch()
    written = ["--superlink", "centre:8000", "--port", str(free_port())]
    with caplog.at_level("INFO"):
        for more in (["--insecure"], ["--root-certificates=ca.crt"]):
            command(SiteConfig.load(site_file), [*written, *more])
        assert "supernode.tls" not in caplog.text
        command(SiteConfig.load(site_file), written)
    assert "name the federation's own with --root-certificates FILE" in caplog.text


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@pytest.fixture
def site_file(tmp_path: Path) -> Path:
    file = tmp_path / "site.toml"
    file.write_text(site_toml(name="a", model="model"))
    return file
