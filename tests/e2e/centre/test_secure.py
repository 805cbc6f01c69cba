"""TLS, SuperNode authentication, the proxy, and signatures with real Flower, by the commands on make_certs' own pages.

The site behind the SuperNode is a toy: what is tested here ends where its socket begins. Without nginx on this machine
the SuperNode talks to the SuperLink itself, and what is said of the proxy is not tested.
"""

import http.client
import json
import os
import shutil
import ssl
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.supercore.protobuf.routing import PROTOBUF_MEDIA_TYPE
from flwr.superlink.main import create_app

from scripts.tools.certs import make as make_certs
from scripts.tools.processes import FLOWER_BIN, Processes, free_port
from scripts.tools.repository import REPOSITORY
from tests.toys.site import ToySite
from umbel import signing
from umbel.messages import RoundReport
from umbel.statements import UpdateStatement

pytestmark = pytest.mark.e2e

PATH = f"{FLOWER_BIN}:{os.environ['PATH']}:/usr/sbin"
NGINX = shutil.which("nginx", path=PATH)
ENVIRONMENT = {
    "PATH": PATH, "PYTHONPATH": str(REPOSITORY), "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
}  # fmt: skip
SITES = ("clinic-a", "clinic-b")
SETTINGS = "rounds=1 quorum=1 rank=2 steps=4 round-seconds=20.0 straggler-seconds=0.0"


class SecureFederation:
    """A centre, the folders of two sites, and one of a stranger from another federation."""

    def __init__(self, folder: Path) -> None:
        self.port, self.folder, self.out = free_port(), folder, folder / "out"
        self.public_port = free_port() if NGINX else self.port
        """The only one that sites know."""
        self.centre, self.stranger = self.out / "centre", folder / "other" / "site-stranger"
        names = ["--sites", *SITES, "--port", str(self.public_port)]
        make_certs.main([str(self.out), "--centre", "localhost", *names])
        make_certs.main([str(folder / "other"), "--centre", "localhost", "--sites", "stranger"])
        self.processes = Processes(folder / "logs")

    def start(self) -> None:
        for program in ("flower-superlink", "flower-superexec"):
            self.processes.start(program, self.shell(self.centre, self.command(self.centre, program)), **ENVIRONMENT)
            self.processes.wait_for(self.answers, "the SuperLink's start", 60)
        if NGINX:
            conf = self.centre / "nginx.conf"
            conf.write_text(conf.read_text().replace(":8000", f":{self.port}"))
            self.processes.start("nginx", self.shell(self.centre, self.command(self.centre, "nginx")), **ENVIRONMENT)
        for line in ("flwr config", "printf"):
            self.run(self.centre, self.command(self.centre, line))
        for site in SITES:
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
        """Run a command that succeeds; return its output."""
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
        command = f"{self.command(folder, 'umbel supernode')} --port {free_port()}"
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

    def status(self, port: int, path: str, method: str = "POST") -> tuple[int, str]:
        """Ask a port for a path, to the letter; return the status and the server that answered."""
        context = ssl.create_default_context(cafile=self.centre / "ca.crt")
        connection = http.client.HTTPSConnection("localhost", port, context=context, timeout=30)
        kinds = dict.fromkeys(("content-type", "accept"), PROTOBUF_MEDIA_TYPE)
        connection.request(method, path, body=b"", headers=kinds)  # every message of Flower's may be empty
        answer = connection.getresponse()
        connection.close()
        return answer.status, (answer.getheader("server") or "").partition("/")[0]

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.centre / "registry" / "events.jsonl").read_text().splitlines()]

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


def test_who_does_not_know_the_superexecs_secret_gets_no_serverapp_to_run(federation: SecureFederation) -> None:
    runtime = [path for path in create_app().openapi()["paths"] if path.startswith("/v1/runtime/")]
    assert "/v1/runtime/acquire-task" in runtime
    for path in runtime:
        assert federation.status(federation.port, path)[0] in (401, 403), path


needs_nginx = pytest.mark.skipif(not NGINX, reason="no nginx on this machine (Debian: apt-get install nginx)")


@needs_nginx
def test_sites_reach_the_fleet_api_and_nothing_else_of_the_superlink(federation: SecureFederation) -> None:
    routes = {(method, path) for path, of in create_app().openapi()["paths"].items() for method in of}
    fleet = {(method, path) for method, path in routes if path.startswith("/v1/fleet/")}
    assert {"/v1/fleet/activate-node", "/v1/fleet/pull-messages"} <= {path for _, path in fleet}
    others = routes - fleet | {("get", "/docs"), ("get", "/openapi.json")}
    assert {"/v1/control/start-run", "/v1/runtime/acquire-task", "/health"} <= {path for _, path in others}
    for method, path in sorted(others):
        assert federation.status(federation.public_port, path, method.upper()) == (404, "nginx"), path
    for method, path in sorted(fleet):
        status, _ = federation.status(federation.public_port, path, method.upper())
        assert status == 401, (path, status)  # Flower's own answer to who has no key
    assert federation.status(federation.port, "/v1/control/list-runs")[0] == 200, "without any key: why it must be so"


@needs_nginx
@pytest.mark.parametrize(
    "path",
    [
        "/v1/fleet/../control/list-runs", "/v1/fleet/..%2fcontrol/list-runs", "/v1/fleet/%2e%2e/control/list-runs",
        "/v1/fleet/./../control/list-runs", "//v1/control/list-runs", "/v1/fleet/..;/control/list-runs",
        "/V1/fleet/../control/list-runs", "/v1/control/..%2ffleet/../control/list-runs",
        "/v1/fleet/x/../../control/list-runs", "/v1/fleet\\..\\control/list-runs",
        "/v1/fleet/%252e%252e/control/list-runs",
    ],
)  # fmt: skip
def test_no_spelling_of_a_path_leads_around_the_proxy(federation: SecureFederation, path: str) -> None:
    assert federation.status(federation.public_port, path)[0] in (400, 401, 404)


def test_a_round_goes_over_all_of_it_and_its_version_is_signed(federation: SecureFederation) -> None:
    folder = federation.out / "site-clinic-a" / "state"
    folder.mkdir(exist_ok=True)
    bundle = federation.command(federation.centre, "umbel bundle").replace("/tmp/umbel-app", "../../app")
    start = federation.command(federation.centre, "flwr run").replace("/tmp/umbel-app", "../../app")
    own, other = (signing.read_private(federation.out / f"site-{name}" / "updates.key") for name in SITES)

    def forged(report: RoundReport) -> RoundReport:
        statement = UpdateStatement.of("clinic-a", site.orders[report.key], report)
        return report.model_copy(update={"signature": signing.sign(other, statement)})

    with ToySite("clinic-a", folder / "site.sock", polls=-1) as site:  # done as soon as it is asked
        federation.run(federation.centre, bundle)
        site.key, honest, site.tamper = own, site.tamper, forged
        federation.run(federation.centre, f"{start} --run-config '{SETTINGS}'")
        failed = federation.events()[-2]
        assert failed["event"] == "round.failed"
        assert "the update's signature is not by this site's key" in failed["reasons"]["clinic-a"]
        site.tamper = honest
        said = federation.run(federation.centre, f"{start} --run-config '{SETTINGS}'")
        assert site.live == "support@v1", said
        site.key = other
        federation.run(federation.centre, f"{start} --run-config '{SETTINGS} grace-seconds=10.0'")
        failed = federation.events()[-2]
        assert failed["event"] == "round.failed"
        assert "site clinic-a: the hello's signature is not by this site's key" in failed["reasons"]["clinic-a"]
    key = signing.read_public(federation.out / "site-clinic-a" / "centre-signing.pub")
    signing.verify(key, site.manifests["support@v1"], site.signatures["support@v1"])
    for submit in site.submits:
        signing.verify(key, submit, submit.signature)
    verified = federation.run(federation.centre, federation.command(federation.centre, "umbel adapter verify"))
    assert verified == "2 versions read, 0 damaged files\n"
    body = (federation.centre / "signing.key").read_bytes().splitlines()[1]
    kept = [path for path in federation.centre.rglob("*") if path.is_file() and path.name != "signing.key"]
    kept += [*(federation.folder / "app").rglob("*.py"), *federation.processes.logs.iterdir()]
    assert not [path for path in kept if path.is_file() and body in path.read_bytes()]
