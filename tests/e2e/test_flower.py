"""Real Flower: a SuperLink, two SuperNodes and `flwr run`, with toy sites on Unix sockets. One SuperNode is killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest

from server.bundle import export
from server.registry import AdapterRegistry
from server.rounds import RoundState
from tests.toy_site import ToySite
from umbel.adapter import AdapterRef

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent

pytestmark = pytest.mark.e2e


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], object], what: str, seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds:g} s"
        time.sleep(0.2)


class Flower:
    """Flower's processes, each with its own FLWR_HOME and process group, all ended when the test ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self._processes: list[subprocess.Popen[bytes]] = []

    def environment(self, home: str) -> dict[str, str]:
        place = self.folder / home
        place.mkdir(exist_ok=True)
        return {
            **os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "FLWR_HOME": str(place), "PYTHONPATH": "",
            "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
        }  # fmt: skip

    def start(self, home: str, *command: str) -> "subprocess.Popen[bytes]":
        with (self.folder / f"{home}.log").open("ab") as log:
            process = subprocess.Popen(
                [str(BIN / command[0]), *command[1:]], env=self.environment(home), cwd=self.folder / home,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self._processes.append(process)
        return process

    def superlink(self, *flags: str) -> "subprocess.Popen[bytes]":
        process = self.start(
            "superlink", "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(self.port),
            "--disable-runtime-dependency-installation", *flags,
        )  # fmt: skip

        def healthy() -> bool:
            try:
                return httpx.get(f"http://127.0.0.1:{self.port}/health").is_success
            except httpx.HTTPError:
                return False

        wait_until(healthy, "the SuperLink's start", 60)
        return process

    def supernode(self, name: str, site: ToySite) -> "subprocess.Popen[bytes]":
        return self.start(
            name, "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{self.port}",
            "--port", str(free_port()), "--node-config", f'socket="{site.socket}"',
        )  # fmt: skip

    def run(self, **settings: object) -> None:
        """`flwr run` from a clean export, until the run is submitted."""
        environment = self.environment("cli")
        app = export(REPOSITORY, self.folder / "app")
        (self.folder / "cli" / "config.toml").write_text(
            f'[superlink]\ndefault = "test"\n[superlink.test]\naddress = "127.0.0.1:{self.port}"\ninsecure = true\n'
        )
        pairs = " ".join(f"{key.replace('_', '-')}={json.dumps(value)}" for key, value in settings.items())
        command = [str(BIN / "flwr"), "run", str(app), "test", "--run-config", pairs]
        done = subprocess.run(command, env=environment, cwd=self.folder / "cli", capture_output=True, timeout=120)
        assert done.returncode == 0, (done.stdout + done.stderr).decode()

    def kill(self, process: "subprocess.Popen[bytes]") -> None:
        """kill -9 of a process and of those it started."""
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def processes(self, program: str = "") -> list[int]:
        """The ids of the processes under this folder's FLWR_HOMEs, in whatever group they are, that run `program`."""
        mark, found = f"FLWR_HOME={self.folder}/".encode(), []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):  # it ended meanwhile, or is not ours to read
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes():
                    found += [int(entry.name)] if program.encode() in (entry / "cmdline").read_bytes() else []
        return found

    def end(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
        for process_id in self.processes():
            with suppress(ProcessLookupError):
                os.kill(process_id, signal.SIGKILL)


@pytest.fixture
def flower(tmp_path: Path) -> Iterator[Flower]:
    processes = Flower(tmp_path)
    try:
        yield processes
    finally:
        processes.end()


def events(root: Path) -> list[dict]:
    path = root / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


@pytest.fixture
def sites(sockets: Path) -> Iterator[list[ToySite]]:
    with ExitStack() as stack:
        yield [stack.enter_context(ToySite(name, sockets / f"{name}.sock")) for name in ("alpha", "beta")]


def require_two_rounds_live(root: Path, sites: list[ToySite]) -> None:
    """Wait for the end of the run, and check what the registry and the sites then hold."""
    ends = ("run.finished", "round.failed", "round.rejected")
    wait_until(lambda: any(event["event"] in ends for event in events(root)), "the end of the run", 400)
    registry = AdapterRegistry(root)
    rounds = [(record.round, record.state) for record in registry.rounds.all("support")]
    assert rounds == [(1, RoundState.PROMOTED), (2, RoundState.PROMOTED)]
    assert registry.aliases("support") == {"head": AdapterRef("support", 2), "live": AdapterRef("support", 2)}
    assert [site.live for site in sites] == ["support@v2", "support@v2"]
    assert [len(site.orders) for site in sites] == [2, 2]
    for manifest in registry.versions("support")[1:]:
        assert manifest.weights == {"alpha": 0.5, "beta": 0.5}
        registry.read(manifest.ref)


SETTINGS = {"rounds": 2, "quorum": 2, "round_seconds": 60.0, "grace_seconds": 180.0, "rank": 2, "steps": 4}


def test_rounds_go_on_after_a_supernode_and_the_serverapp_were_killed(
    flower: Flower, tmp_path: Path, sites: list[ToySite]
) -> None:
    sites[1].polls = 10**6  # beta does not finish before its SuperNode was killed
    flower.superlink()
    nodes = [flower.supernode(site.name, site) for site in sites]
    flower.run(registry=str(tmp_path / "registry"), **SETTINGS)
    wait_until(lambda: sites[1].orders, "beta's first round")
    flower.kill(nodes[1])
    for process_id in flower.processes("flwr-serverapp"):
        os.kill(process_id, signal.SIGKILL)
    sites[1].polls = 1
    flower.supernode("beta", sites[1])
    # Flower ends the run of a dead ServerApp; the next one takes its round over.
    flower.run(registry=str(tmp_path / "registry"), **SETTINGS)
    require_two_rounds_live(tmp_path / "registry", sites)


def test_a_run_goes_on_after_the_superlink_was_killed(flower: Flower, tmp_path: Path, sites: list[ToySite]) -> None:
    # The form of deployment that survives: a database, and a SuperExec of its own that starts the ServerApp.
    secret = tmp_path / "superexec.secret"
    secret.write_text("0" * 64)
    durable = ["--isolation", "process", "--superexec-auth-secret-file", str(secret),
               "--database", str(tmp_path / "superlink.db")]  # fmt: skip
    sites[1].polls = 10**6
    superlink = flower.superlink(*durable)
    flower.start(
        "superexec", "flower-superexec", "--insecure", "--runtime-api-address", f"127.0.0.1:{flower.port}",
        "--superexec-auth-secret-file", str(secret),
    )  # fmt: skip
    for site in sites:
        flower.supernode(site.name, site)
    flower.run(registry=str(tmp_path / "registry"), **SETTINGS)
    wait_until(lambda: sites[1].orders, "beta's first round")
    flower.kill(superlink)
    time.sleep(5)  # a supervisor's pause before it starts a dead service again
    sites[1].polls = 1
    flower.superlink(*durable)
    require_two_rounds_live(tmp_path / "registry", sites)
