"""Starting and ending the demo's processes: each in a session of its own, none left behind."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import httpx

REPOSITORY = Path(__file__).resolve().parents[1]
FLOWER_BIN = REPOSITORY / ".venv" / "bin"
ENGINE_BIN = REPOSITORY / ".venv-engine" / "bin"
STOP_S = 30.0


class DemoError(Exception):
    """The demo cannot go on; the message says why and where the log is."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Processes:
    """Every process of the demo, ended in the reverse order of their start."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self._running: list[tuple[str, subprocess.Popen[bytes]]] = []

    def start(self, name: str, command: list[str], **environment: str) -> "subprocess.Popen[bytes]":
        with (self.logs / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command, env={**os.environ, **environment}, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
        self._running.append((name, process))
        return process

    def require_alive(self) -> None:
        """Raise DemoError if something that should run has ended."""
        for name, process in self._running:
            if process.poll() not in (None, 0):
                log = self.logs / f"{name}.log"
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
                raise DemoError(f"{name} ended with status {process.returncode}; {log} ends:\n{tail}")

    def wait_for(self, condition: Callable[[], bool], what: str, seconds: float) -> None:
        """Poll until `condition`; raise DemoError when a process ends or time is up."""
        deadline = time.monotonic() + seconds
        while not condition():
            self.require_alive()
            if time.monotonic() > deadline:
                raise DemoError(f"{what} took longer than {seconds:.0f} s; see {self.logs}")
            time.sleep(0.3)

    def stop(self) -> None:
        """SIGTERM, patience, then the whole group."""
        for _, process in reversed(self._running):
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + STOP_S
        for _, process in reversed(self._running):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._running.clear()


class Flower:
    """A SuperLink on a free port, its SuperNodes, and `flwr run`."""

    def __init__(self, processes: Processes, home: Path) -> None:
        self._processes, self._home, self.port = processes, home, free_port()

    def start_superlink(self) -> None:
        self._start(
            "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(self.port),
            "--disable-runtime-dependency-installation",
        )  # fmt: skip
        self._processes.wait_for(self._healthy, "the SuperLink's start", 60)

    def start_supernode(self, site: str, control_socket: Path) -> None:
        self._start(
            "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{self.port}", "--port", str(free_port()),
            "--node-config", f'socket="{control_socket}"', name=f"supernode-{site}",
        )  # fmt: skip

    def run(self, app: Path, settings: dict[str, object]) -> "subprocess.Popen[bytes]":
        """`flwr run --stream`: the process ends when the run does."""
        pairs = " ".join(f"{key}={_toml(value)}" for key, value in settings.items())
        home = self._environment("flwr")["FLWR_HOME"]
        Path(home, "config.toml").write_text(
            f'[superlink]\ndefault = "demo"\n[superlink.demo]\naddress = "127.0.0.1:{self.port}"\ninsecure = true\n'
        )
        return self._start("flwr", "run", str(app), "demo", "--stream", "--run-config", pairs)

    def _start(self, program: str, *arguments: str, name: str = "") -> "subprocess.Popen[bytes]":
        name = name or program
        return self._processes.start(name, [str(FLOWER_BIN / program), *arguments], **self._environment(name))

    def _environment(self, name: str) -> dict[str, str]:
        home = self._home / name
        home.mkdir(parents=True, exist_ok=True)
        return {
            "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2", "PATH": f"{FLOWER_BIN}:{os.environ['PATH']}",
        }  # fmt: skip

    def _healthy(self) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/health").is_success
        except httpx.HTTPError:
            return False


def _toml(value: object) -> str:
    return f'"{value}"' if isinstance(value, str | Path) else str(value)
