"""`Processes` starts a federation's processes on one machine and ends all of them; `Flower` starts those of Flower."""

import contextlib
import itertools
import os
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import httpx

from scripts.tools.repository import REPOSITORY
from umbel.site.template import toml_value

FLOWER_BIN = REPOSITORY / ".venv" / "bin"
ENGINE_BIN = REPOSITORY / ".venv-engine" / "bin"
STOP_S = 30.0


class ProcessError(Exception):
    """Raised when a process that should run has ended, or takes too long; the message names its log."""


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def end_as_ctrl_c() -> None:
    """Let SIGTERM and SIGHUP end this program as Ctrl-C does, so that it leaves nothing running."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)


class Processes:
    """Processes of one run. They and their descendants carry a mark in their environment, by which they are found."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        logs.mkdir(parents=True, exist_ok=True)
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, command: list[str], **environment: str) -> "subprocess.Popen[bytes]":
        """Start a command in a session of its own; `environment` adds to this process's, output goes to NAME.log."""
        with (self.logs / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command, env={**os.environ, **environment, "UMBEL_PROCESSES": str(self.logs)}, cwd=self.logs,
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        self._running[name] = process
        return process

    def require_alive(self) -> None:
        """Raise ProcessError if a started process has ended with another status than 0."""
        for name, process in self._running.items():
            if process.poll() not in (None, 0):
                log = self.logs / f"{name}.log"
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
                raise ProcessError(f"{name} ended with status {process.returncode}; {log} ends:\n{tail}")

    def wait_for(self, condition: Callable[[], object], what: str, seconds: float) -> None:
        """Poll until `condition` is true; raise ProcessError when a process ends or after so many seconds."""
        deadline = time.monotonic() + seconds
        while not condition():
            self.require_alive()
            if time.monotonic() > deadline:
                raise ProcessError(f"{what} took longer than {seconds:.0f} s; see {self.logs}")
            time.sleep(0.3)

    def find(self, program: str = "") -> list[int]:
        """Return the ids of all processes of this run that have `program` in their command line."""
        mark, found = f"UMBEL_PROCESSES={self.logs}\0".encode(), []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):  # it has ended meanwhile, or is not ours to read
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes() + b"\0":
                    found += [int(entry.name)] if program.encode() in (entry / "cmdline").read_bytes() else []
        return found

    def kill(self, name: str) -> None:
        """Kill a process and its group with SIGKILL, as a crash would."""
        process = self._running.pop(name)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def stop(self) -> None:
        """Send SIGTERM in the reverse order of the start, wait, then kill all that is left of this run."""
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
    """A SuperLink on a free port, its SuperNodes, and `flwr run`.

    With `keys`, a folder of make_certs, they run as its pages say: with TLS, with SuperNodes that are known by their
    keys, and with run configurations that name the signing keys. `durable` is the form in which a run survives a killed
    SuperLink; with keys it always is that form.
    """

    def __init__(self, processes: Processes, home: Path, *, durable: bool = False, keys: Path | None = None) -> None:
        self._processes, self._home, self.port = processes, home, free_port()
        home.mkdir(parents=True, exist_ok=True)
        self._keys = keys
        self._trust = ["--root-certificates", str(keys / "centre" / "ca.crt")] if keys else ["--insecure"]
        self._durable: list[str] = []
        if durable or keys:  # see docs/how-to/survive-a-killed-superlink.md
            secret = keys / "centre" / "superexec.secret" if keys else home / "superexec.secret"
            if not keys:
                secret.write_bytes(os.urandom(32).hex().encode())
            self._secret = ["--superexec-auth-secret-file", str(secret)]
            self._durable = ["--isolation", "process", *self._secret, "--database", str(home / "superlink.db")]

    def start_superlink(self) -> None:
        """Start the SuperLink and wait until it answers."""
        self._start(
            "flower-superlink", *self._identity(), "--host", "127.0.0.1", "--port", str(self.port),
            "--disable-runtime-dependency-installation", *self._durable,
        )  # fmt: skip
        self._processes.wait_for(self._healthy, "the SuperLink's start", 60)

    def start_superexec(self) -> None:
        """Start the SuperExec, which starts the ServerApps of a durable SuperLink."""
        address = f"127.0.0.1:{self.port}"
        self._start("flower-superexec", *self._trust, "--runtime-api-address", address, *self._secret)

    def register(self, site: str) -> None:
        """Register a site's key at the SuperLink, so that its SuperNode may connect."""
        assert self._keys is not None
        public = self._keys / "centre" / "supernodes" / f"{site}.pub"
        self._find_superlink()
        command = self._start("flwr", "supernode", "register", str(public), "here", "--name", site)
        self._processes.wait_for(lambda: command.poll() is not None, f"registering {site}'s key", 60)
        self._processes.require_alive()

    def start_supernode(self, site: str, site_file: Path) -> None:
        """Start a site's SuperNode; with keys, the site has to be registered before."""
        key = ["--auth-supernode-private-key", str(self._keys / f"site-{site}" / "supernode.key")] if self._keys else []
        self._start(
            "umbel", "supernode", str(site_file), *self._trust, *key, "--superlink", f"127.0.0.1:{self.port}",
            "--port", str(free_port()), name=f"supernode-{site}",
        )  # fmt: skip

    def run(
        self, app: Path, settings: Mapping[str, object], *, stream: bool = True, name: str = "flwr"
    ) -> "subprocess.Popen[bytes]":
        """Start `flwr run`: with `stream` its process ends when the run does, else when the run is submitted.

        `name`: of the process and its log; runs at the same time have different ones.
        """
        if self._keys:
            signed = {
                "signing-key": self._keys / "centre" / "signing.key",
                "site-keys": self._keys / "centre" / "sites",
            }
            settings = {**signed, **settings}
        pairs = " ".join(f"{key}={toml_value(value)}" for key, value in settings.items())
        self._find_superlink()
        command = [str(FLOWER_BIN / "flwr"), "run", str(app), "here", *["--stream"] * stream, "--run-config", pairs]
        return self._processes.start(name, command, **self._environment("flwr"))

    def _find_superlink(self) -> None:
        """Say where `flwr` finds it."""
        trust = (
            f"root-certificates = {toml_value(self._keys / 'centre' / 'ca.crt')}" if self._keys else "insecure = true"
        )
        Path(self._environment("flwr")["FLWR_HOME"], "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{self.port}"\n{trust}\n'
        )

    def _identity(self) -> list[str]:
        """Return the SuperLink's options for TLS and for the authentication of SuperNodes."""
        if self._keys is None:
            return ["--insecure"]
        files = {"ca-certfile": "ca.crt", "certfile": "superlink.crt", "keyfile": "superlink.key"}
        given = [(f"--ssl-{option}", str(self._keys / "centre" / file)) for option, file in files.items()]
        return [*itertools.chain(*given), "--enable-supernode-auth"]

    def _start(self, program: str, *arguments: str, name: str = "") -> "subprocess.Popen[bytes]":
        name = name or program
        return self._processes.start(name, [str(FLOWER_BIN / program), *arguments], **self._environment(name))

    def _environment(self, name: str) -> dict[str, str]:
        home = self._home / name
        home.mkdir(parents=True, exist_ok=True)
        return {
            "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
            "PATH": f"{FLOWER_BIN}:{os.environ['PATH']}",
        }  # fmt: skip

    def _healthy(self) -> bool:
        try:
            trusted = ssl.create_default_context(cafile=self._keys / "centre" / "ca.crt" if self._keys else None)
            scheme = "https" if self._keys else "http"
            return httpx.get(f"{scheme}://127.0.0.1:{self.port}/health", verify=trusted).is_success
        except httpx.HTTPError:
            return False
