"""Processes of a federation: all of them end, whatever group they moved to, and Flower's get the options they need."""

import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from scripts.tools.certs import make as make_certs
from scripts.tools.processes import FLOWER_BIN, Flower, ProcessError, Processes, free_port

FOREVER = [sys.executable, "-c", "import time; time.sleep(600)"]


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    started = Processes(tmp_path / "logs")
    yield started
    started.stop()
    assert started.find() == []


def test_a_process_writes_its_log_and_is_found_by_its_command_line(processes: Processes) -> None:
    processes.start("a", [sys.executable, "-c", "import os, time; print(os.environ['X'], flush=True); time.sleep(600)"],
                    X="said")  # fmt: skip
    processes.wait_for(lambda: (processes.logs / "a.log").read_text() == "said\n", "a line", 30)
    assert len(processes.find("time.sleep")) == 1
    assert processes.find("no such program") == []


def test_what_left_its_parents_group_is_ended_too(processes: Processes) -> None:
    code = f"import subprocess, time; subprocess.Popen({FOREVER}, start_new_session=True); time.sleep(600)"
    processes.start("parent", [sys.executable, "-c", code])
    processes.wait_for(lambda: len(processes.find()) == 2, "the child", 30)
    ids = processes.find()
    processes.kill("parent")
    assert len(processes.find()) == 1, "the child has outlived the group"
    processes.stop()
    assert psutil.wait_procs([psutil.Process(one) for one in ids if psutil.pid_exists(one)], timeout=10)[1] == []


def test_one_that_ignores_sigterm_is_killed(processes: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scripts.tools.processes.STOP_S", 0.5)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
    process = processes.start("deaf", [sys.executable, "-c", deaf])
    processes.wait_for(lambda: (processes.logs / "deaf.log").read_text(), "a line", 30)
    processes.stop()
    assert process.wait(10) == -9


def test_one_that_ended_is_told_with_the_end_of_its_log(processes: Processes) -> None:
    processes.start("good", [sys.executable, "-c", ""]).wait()
    processes.require_alive()
    processes.start("bad", [sys.executable, "-c", "raise SystemExit('why it ended')"]).wait()
    with pytest.raises(ProcessError, match=r"bad ended with status 1; .*bad\.log ends:\nwhy it ended"):
        processes.wait_for(lambda: False, "something", 30)


def test_waiting_has_an_end(processes: Processes) -> None:
    processes.start("a", FOREVER)
    with pytest.raises(ProcessError, match=r"the moon took longer than 0 s; see .*logs"):
        processes.wait_for(lambda: False, "the moon", 0.1)


def test_a_free_port_can_be_bound() -> None:
    assert 1024 < free_port() < 65536


class Recorded(Processes):
    """Processes that are not started: their commands and environments are kept."""

    def __init__(self, logs: Path) -> None:
        super().__init__(logs)
        self.commands: dict[str, list[str]] = {}
        self.environments: dict[str, dict[str, str]] = {}

    def start(self, name: str, command: list[str], **environment: str) -> "subprocess.Popen[bytes]":
        self.commands[name], self.environments[name] = command, environment
        return subprocess.Popen(["true"])

    def wait_for(self, *_: object) -> None: ...


def flower(folder: Path, keys: Path | None = None, *, durable: bool = False) -> tuple[Flower, Recorded]:
    processes = Recorded(folder / "logs")
    started = Flower(processes, folder / "flower", durable=durable, keys=keys)
    started.start_superlink()
    started.start_supernode("a", folder / "site.toml")
    started.run(folder / "app", {"registry": folder / "registry", "rounds": 2, "waves": "0.5,1"})
    return started, processes


def test_without_keys_all_of_flower_is_insecure(tmp_path: Path) -> None:
    started, processes = flower(tmp_path)
    assert all("--insecure" in processes.commands[name] for name in ("flower-superlink", "supernode-a"))
    assert "--database" not in processes.commands["flower-superlink"]
    config = tomllib.loads((tmp_path / "flower" / "flwr" / "config.toml").read_text())
    assert config["superlink"]["here"] == {"address": f"127.0.0.1:{started.port}", "insecure": True}
    settings = processes.commands["flwr"][-1]
    assert settings == f'registry="{tmp_path / "registry"}" rounds=2 waves="0.5,1"'


def test_the_durable_form_shares_a_secret(tmp_path: Path) -> None:
    started, processes = flower(tmp_path, durable=True)
    started.start_superexec()
    secret = str(tmp_path / "flower" / "superexec.secret")
    assert len(Path(secret).read_bytes()) == 64
    for name in ("flower-superlink", "flower-superexec"):
        command = processes.commands[name]
        assert command[command.index("--superexec-auth-secret-file") + 1] == secret
    assert processes.commands["flower-superlink"][-1] == str(tmp_path / "flower" / "superlink.db")


def test_with_keys_nothing_is_insecure_and_runs_are_signed(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    make_certs.make(keys, "localhost", ["a"], 1, 8443)
    started, processes = flower(tmp_path, keys)
    started.start_superexec()
    assert not any("--insecure" in command for command in processes.commands.values())
    named = [word for command in processes.commands.values() for word in command if word.startswith(str(keys))]
    assert named
    assert all(Path(word).is_file() for word in named)
    assert f'signing-key="{keys / "centre" / "signing.key"}"' in processes.commands["flwr"][-1]
    config = tomllib.loads((tmp_path / "flower" / "flwr" / "config.toml").read_text())
    assert config["superlink"]["here"]["root-certificates"] == str(keys / "centre" / "ca.crt")


def test_flowers_programs_have_homes_of_their_own_and_report_nothing(tmp_path: Path) -> None:
    _, processes = flower(tmp_path)
    homes = [environment["FLWR_HOME"] for environment in processes.environments.values()]
    assert len(set(homes)) == len(homes) == 3
    for environment in processes.environments.values():
        assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
        assert environment["PATH"] == f"{FLOWER_BIN}:{os.environ['PATH']}"


def test_killing_is_at_once(processes: Processes) -> None:
    process = processes.start("a", FOREVER)
    began = time.monotonic()
    processes.kill("a")
    assert process.returncode == -9
    assert time.monotonic() - began < 10
