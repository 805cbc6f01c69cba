"""TLS, SuperNode authentication and signed versions with real Flower, by the commands on make_certs' own pages.

The site behind the SuperNode is a toy: what is tested here ends where its socket begins.
"""

import os
import ssl
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import make_certs
import pytest
from processes import FLOWER_BIN, REPOSITORY, Processes, free_port

from tests.toy_site import ToySite
from umbel import signing

pytestmark = pytest.mark.e2e

ENVIRONMENT = {
    "PATH": f"{FLOWER_BIN}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY), "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
}  # fmt: skip
SETTINGS = "rounds=1 quorum=1 rank=2 steps=4 round-seconds=20.0 straggler-seconds=0.0"


class SecureFederation:
    """A centre, the folders of two sites, and one of a stranger from another federation."""

    def __init__(self, folder: Path) -> None:
        self.port, self.folder, self.out = free_port(), folder, folder / "out"
        self.centre, self.stranger = self.out / "centre", folder / "other" / "site-stranger"
        names = ["--sites", "clinic-a", "clinic-b", "--port", str(self.port)]
        make_certs.main([str(self.out), "--centre", "localhost", *names])
        make_certs.main([str(folder / "other"), "--centre", "localhost", "--sites", "stranger"])
        self.processes = Processes(folder / "logs")

    def start(self) -> None:
        for program in ("flower-superlink", "flower-superexec"):
            self.processes.start(program, self.shell(self.centre, self.command(self.centre, program)), **ENVIRONMENT)
            self.processes.wait_for(self.answers, "the SuperLink's start", 60)
        for line in ("flwr config", "printf"):
            self.run(self.centre, self.command(self.centre, line))
        for site in ("clinic-a", "clinic-b"):
            self.run(self.centre, self.command(self.centre, "flwr supernode").replace("SITE", site))
        self.processes.start("supernode", self.supernode("clinic-a"), **ENVIRONMENT)
        self.processes.wait_for(lambda: "[Fleet.ActivateNode] Activated" in self.log(), "the SuperNode's start", 60)

    def command(self, folder: Path, beginning: str) -> str:
        """The command on a folder's page that begins so, with this test's port."""
        lines = (folder / "README.md").read_text().replace("\\\n", " ").splitlines()
        (line,) = [line.partition("   #")[0] for line in lines if line.startswith(beginning)]
        return line.replace(":8000", f":{self.port}").replace("--port 8000", f"--port {self.port}")

    def shell(self, folder: Path, command: str) -> list[str]:
        exports = self.command(self.centre, "export")
        return ["sh", "-c", f"cd {folder} && {exports} && mkdir -p $FLWR_HOME && exec {command}"]

    def run(self, folder: Path, command: str) -> str:
        """What a command says that succeeds."""
        ended = self.end(folder, command)
        assert ended.returncode == 0, ended.stdout
        return ended.stdout

    def end(self, folder: Path, command: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            self.shell(folder, command), env={**os.environ, **ENVIRONMENT}, check=False, timeout=400, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def supernode(self, site: str, **instead: str) -> list[str]:
        """The command of a site's page, with other files where a test says so."""
        folder = self.out / f"site-{site}"
        command = f"{self.command(folder, 'flower-supernode')} --port {free_port()}"
        for old, new in instead.items():
            assert command.count(f" {old} ") == 1
            command = command.replace(old, new)
        return self.shell(folder, command)

    def answers(self) -> bool:
        try:
            context = ssl.create_default_context(cafile=self.centre / "ca.crt")
            return httpx.get(f"https://localhost:{self.port}/health", verify=context).is_success
        except httpx.TransportError:
            return False

    def log(self) -> str:
        return (self.processes.logs / "flower-superlink.log").read_text()


@pytest.fixture(scope="module")
def federation() -> Iterator[SecureFederation]:
    with tempfile.TemporaryDirectory(prefix="umbel-") as folder:
        made = SecureFederation(Path(folder))
        try:
            made.start()
            yield made
        finally:
            made.processes.stop()


KEY = "--auth-supernode-private-key supernode.key"


@pytest.mark.parametrize(
    ("option", "instead", "why"),
    [
        (KEY, "", "[code: 2001]"),
        (KEY, "--auth-supernode-private-key {stranger}/supernode.key", "[code: 2004]"),
        (KEY, "--auth-supernode-private-key {out}/site-clinic-a/supernode.key", "[code: 2004]"),
        ("ca.crt", "{stranger}/ca.crt", "certificate verify failed"),
    ],
    ids=["no key", "a stranger's key", "the key of a site that is connected", "another CA"],
)
def test_a_supernode_that_may_not_connect_is_refused(
    federation: SecureFederation, option: str, instead: str, why: str
) -> None:
    told = instead.format(stranger=federation.stranger, out=federation.out)
    refused = Processes(federation.folder / "refused" / str(free_port()))
    process = refused.start("supernode", federation.supernode("clinic-b", **{option: told}), **ENVIRONMENT)
    try:
        assert process.wait(60) != 0
    finally:
        refused.stop()
    said = (refused.logs / "supernode.log").read_text()
    assert "Exit Code: 305" in said
    assert why in said
    assert federation.log().count("[Fleet.ActivateNode] Activated") == 1


def test_a_round_goes_over_all_of_it_and_its_version_is_signed(federation: SecureFederation) -> None:
    folder = federation.out / "site-clinic-a" / "state"
    folder.mkdir(exist_ok=True)
    bundle = federation.command(federation.centre, "umbel bundle").replace("/tmp/umbel-app", "../../app")
    start = federation.command(federation.centre, "flwr run").replace("/tmp/umbel-app", "../../app")
    with ToySite("clinic-a", folder / "site.sock", polls=-1) as site:  # done as soon as it is asked
        federation.run(federation.centre, bundle)
        said = federation.run(federation.centre, f"{start} --run-config '{SETTINGS}'")
    assert site.live == "support@v1", said
    key = signing.read_public(federation.out / "site-clinic-a" / "centre-signing.pub")
    signing.verify(key, site.manifests["support@v1"], site.signatures["support@v1"])
    verified = federation.run(federation.centre, federation.command(federation.centre, "umbel adapter verify"))
    assert verified == "2 versions read, 0 damaged files\n"
    body = (federation.centre / "signing.key").read_bytes().splitlines()[1]
    kept = [path for path in federation.centre.rglob("*") if path.is_file() and path.name != "signing.key"]
    kept += [*(federation.folder / "app").rglob("*.py"), *federation.processes.logs.iterdir()]
    assert not [path for path in kept if path.is_file() and body in path.read_bytes()]
