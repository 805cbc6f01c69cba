"""Three sites over a real SuperLink: who was away catches up, one command rolls all back, a refusal is kept.

Two adapters are trained there at once, each by a run of its own, and what happens to one leaves the other as it is.
The sites are quick_site.py's: daemon, control API, journal and deployer are real, training and measuring are not.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from scripts.tools.processes import FLOWER_BIN, Flower, Processes, free_port
from scripts.tools.repository import REPOSITORY
from server.bundle import export
from tests.toys.sites.base_dir import write_base
from umbel.site.template import site_toml

pytestmark = pytest.mark.e2e

SITES = ("north", "south", "west")
SETTINGS = {
    "rank": 2, "steps": 4, "quorum": 2, "round-seconds": 20.0, "straggler-seconds": 5.0, "grace-seconds": 120.0,
}  # fmt: skip
PATH = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
ADAPTERS = ("support", "billing")
TABLES = {"engine": {"dtype": "float32", "max_lora_rank": 4}, "adapter": [{"name": name} for name in ADAPTERS]}


class Fleet:
    """The sites, Flower, and the commands of an operator."""

    def __init__(self, folder: Path, processes: Processes) -> None:
        self.folder, self.processes, self.registry = folder, processes, folder / "registry"
        self.flower = Flower(processes, folder / "flower")
        self.app = export(REPOSITORY, folder / "app")
        write_base(folder / "base", num_hidden_layers=1, num_key_value_heads=2)
        for name in SITES:
            (folder / name).mkdir()
            (folder / name / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
            (folder / name / "site.toml").write_text(site_toml(TABLES, name=name, model="../base", port=free_port()))
            script = REPOSITORY / "tests" / "toys" / "sites" / "quick_site.py"
            command = [sys.executable, str(script), str(folder / name / "site.toml")]
            processes.start(f"site-{name}", command, PYTHONPATH=PATH)
        self.flower.start_superlink()
        for name in SITES:
            processes.wait_for(lambda name=name: self.socket(name).exists(), f"{name}'s start", 120)
            self.flower.start_supernode(name, self.folder / name / "site.toml")
        self.wait_connected(len(SITES))

    def wait_connected(self, times: int) -> None:
        """Until SuperNodes have connected so often."""
        log = self.processes.logs / "flower-superlink.log"
        done = "[Fleet.ActivateNode] Activated"
        self.processes.wait_for(lambda: log.read_text().count(done) >= times, "the SuperNodes' start", 120)

    def socket(self, name: str) -> Path:
        return self.folder / name / "state" / "site.sock"

    def ask(self, name: str, method: str, path: str) -> dict[str, Any]:
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(self.socket(name))), timeout=60) as control:
            reply: dict[str, Any] = control.request(method, f"http://site{path}").raise_for_status().json()
            return reply

    @property
    def live(self) -> list[str | None]:
        """The versions of support that answer at north, south and west."""
        return self.live_of("support")

    def live_of(self, adapter: str) -> list[str | None]:
        hellos = [self.ask(name, "GET", f"/hello?adapter={adapter}") for name in SITES]
        assert not [hello for hello in hellos for other in {*ADAPTERS} - {adapter} if other in json.dumps(hello)]
        return [hello["live"] for hello in hellos]

    def run(self, rounds: int, *adapters: str, **settings: object) -> None:
        """Run rounds of support, or of other adapters at the same time."""
        given = {**SETTINGS, **settings, "registry": self.registry, "rounds": rounds}
        runs = {
            adapter: self.flower.run(self.app, {**given, "adapter": adapter}, name=f"flwr-{adapter}")
            for adapter in adapters or ("support",)
        }
        for adapter, run in runs.items():
            assert run.wait(400) == 0, self.log(adapter)
            assert self.events("run.finished", adapter), self.log(adapter)

    def events(self, kind: str, adapter: str = "support") -> list[dict[str, Any]]:
        lines = (self.registry / "events.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if (event["event"], event["adapter"]) == (kind, adapter)]

    def log(self, adapter: str) -> str:
        return (self.processes.logs / f"flwr-{adapter}.log").read_text()[-3000:]

    def umbel(self, command: str, *arguments: str) -> list[str]:
        """Run `umbel fleet …` as an operator would; return its lines about the sites."""
        line = [FLOWER_BIN / "umbel", "fleet", command, "support", "--registry", self.registry, "--app", self.app]
        environment = {
            **os.environ, "PYTHONPATH": str(REPOSITORY), "FLWR_HOME": str(self.folder / "flower" / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
            "PATH": f"{FLOWER_BIN}:{os.environ['PATH']}",
        }  # fmt: skip
        more = ["--federation", "here", "--run-config", "straggler-seconds=5.0 grace-seconds=120.0", *arguments]
        ended = subprocess.run([*line, *more], env=environment, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stdout + ended.stderr[-3000:]
        return [said for said in ended.stdout.splitlines() if not said.startswith("support: ")]


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    with tempfile.TemporaryDirectory(prefix="umbel-") as name:
        processes = Processes(Path(name) / "logs")
        try:
            yield Fleet(Path(name), processes)
        finally:
            processes.stop()


def test_the_fleet_follows_the_registry_and_every_sites_own_word(fleet: Fleet) -> None:
    fleet.run(1, *ADAPTERS, quorum=3, waves="0.3,1", **{"wave-seconds": 1.0})
    (billing,), (support,) = (fleet.events("round.started", adapter) for adapter in ("billing", "support"))
    assert billing["parent"] == support["parent"], "both begin with the same untrained adapter: rounds of the same key"
    assert fleet.live_of("billing") == ["billing@v1"] * 3, fleet.events("round.rejected", "billing")
    assert fleet.live == ["support@v1"] * 3, fleet.events("round.rejected") + fleet.events("round.failed")
    (plan,) = fleet.events("fleet.waves")
    assert [len(wave) for wave in plan["waves"]] == [1, 2]
    assert [wave["sites"] for wave in fleet.events("fleet.wave")] == [plan["waves"][0], sorted(SITES)]

    fleet.processes.kill("supernode-west")
    fleet.run(1)
    assert fleet.live == ["support@v2", "support@v2", "support@v1"], "west was away"
    fleet.flower.start_supernode("west", fleet.folder / "west" / "site.toml")
    fleet.wait_connected(len(SITES) + 1)
    assert fleet.umbel("reconcile") == [
        "north: support@v2 answered already",
        "south: support@v2 answered already",
        "west: support@v2 answers, instead of support@v1",
    ]
    assert fleet.live == ["support@v2"] * 3

    assert fleet.ask("south", "POST", "/adapters/support/rollback") == {"live": "support@v1"}
    kept = "south: keeps what it has: it has rejected support@v2, or went back from it by itself"
    assert kept in fleet.umbel("reconcile")
    assert fleet.umbel("rollback", "--why", "worse answers") == [
        "north: support@v1 answers, instead of support@v2",
        "south: support@v1 answered already",
        "west: support@v1 answers, instead of support@v2",
    ]
    assert fleet.live == ["support@v1"] * 3
    assert fleet.umbel("rollback", "--why", "it was something else")[1] == kept
    assert fleet.live == ["support@v2", "support@v1", "support@v2"]

    (fleet.folder / "west" / "state" / "against").write_text("support-v3")
    fleet.run(1)
    assert fleet.live == ["support@v3", "support@v3", "support@v2"], "a newer version, and who is against that one"
    assert fleet.events("fleet.reconciled")[-1]["kept"].keys() == {"west"}
    assert fleet.live_of("billing") == ["billing@v1"] * 3, "nothing that happened to support happened to billing"
    assert [(event["round"], len(event["sites"])) for event in fleet.events("round.promoted", "billing")] == [(1, 3)]
