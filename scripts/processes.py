"""Starting and ending the processes of a federation on one machine: none is left behind, whatever group it moved to."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import httpx

REPOSITORY = Path(__file__).resolve().parents[1]
FLOWER_BIN = REPOSITORY / ".venv" / "bin"
ENGINE_BIN = REPOSITORY / ".venv-engine" / "bin"
STOP_S = 30.0


class ProcessError(Exception):
    """Something that should run has ended, or takes too long; the message says where the log is."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Processes:
    """Every process started here, and whatever they start: all of them carry this folder's mark."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        logs.mkdir(parents=True, exist_ok=True)
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, command: list[str], **environment: str) -> "subprocess.Popen[bytes]":
        with (self.logs / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command, env={**os.environ, **environment, "UMBEL_PROCESSES": str(self.logs)}, cwd=self.logs,
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        self._running[name] = process
        return process

    def require_alive(self) -> None:
        """Raise ProcessError if something that should run has ended."""
        for name, process in self._running.items():
            if process.poll() not in (None, 0):
                log = self.logs / f"{name}.log"
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
                raise ProcessError(f"{name} ended with status {process.returncode}; {log} ends:\n{tail}")

    def wait_for(self, condition: Callable[[], object], what: str, seconds: float) -> None:
        """Poll until `condition`; raise ProcessError when a process ends or time is up."""
        deadline = time.monotonic() + seconds
        while not condition():
            self.require_alive()
            if time.monotonic() > deadline:
                raise ProcessError(f"{what} took longer than {seconds:.0f} s; see {self.logs}")
            time.sleep(0.3)

    def find(self, program: str = "") -> list[int]:
        """Process ids of what runs here with `program` in its command line."""
        mark, found = f"UMBEL_PROCESSES={self.logs}\0".encode(), []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):  # it has ended meanwhile, or is not ours to read
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes() + b"\0":
                    found += [int(entry.name)] if program.encode() in (entry / "cmdline").read_bytes() else []
        return found

    def kill(self, name: str) -> None:
        """kill -9 of a process and its group, as a crash would."""
        process = self._running.pop(name)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def stop(self) -> None:
        """SIGTERM in the reverse order of the start, patience, then kill whatever is left."""
        for process in reversed(self._running.values()):
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + STOP_S
        for process in reversed(self._running.values()):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))
        for process_id in self.find():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process_id, signal.SIGKILL)
        self._running.clear()


class Flower:
    """A SuperLink on a free port, its SuperNodes, and `flwr run`."""

    def __init__(self, processes: Processes, home: Path, *, durable: bool = False) -> None:
        self._processes, self._home, self.port = processes, home, free_port()
        home.mkdir(parents=True, exist_ok=True)
        self._durable: list[str] = []
        if durable:  # the form that survives a killed SuperLink, see docs/operations.md
            secret = home / "superexec.secret"
            secret.write_bytes(os.urandom(32).hex().encode())
            self._secret = ["--superexec-auth-secret-file", str(secret)]
            self._durable = ["--isolation", "process", *self._secret, "--database", str(home / "superlink.db")]

    def start_superlink(self) -> None:
        self._start(
            "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(self.port),
            "--disable-runtime-dependency-installation", *self._durable,
        )  # fmt: skip
        self._processes.wait_for(self._healthy, "the SuperLink's start", 60)

    def start_superexec(self) -> None:
        """What starts ServerApps for a durable SuperLink."""
        address = f"127.0.0.1:{self.port}"
        self._start("flower-superexec", "--insecure", "--runtime-api-address", address, *self._secret)

    def start_supernode(self, site: str, control_socket: Path) -> None:
        self._start(
            "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{self.port}", "--port", str(free_port()),
            "--node-config", f'socket="{control_socket}"', name=f"supernode-{site}",
        )  # fmt: skip

    def run(self, app: Path, settings: Mapping[str, object], *, stream: bool = True) -> "subprocess.Popen[bytes]":
        """`flwr run`: with `stream` the process ends when the run does, else when it is submitted."""
        pairs = " ".join(f"{key}={_toml(value)}" for key, value in settings.items())
        home = self._environment("flwr")["FLWR_HOME"]
        Path(home, "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{self.port}"\ninsecure = true\n'
        )
        return self._start("flwr", "run", str(app), "here", *["--stream"] * stream, "--run-config", pairs)

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
    return json.dumps(str(value) if isinstance(value, Path) else value)  # TOML writes these as JSON does
