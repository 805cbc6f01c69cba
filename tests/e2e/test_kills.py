"""Kill -9 of every kind of process while a federation of two real sites is at work.

Each is started again as a supervisor would. Users of the other site notice nothing, users of the struck one at most the
engine's restart; then rounds go on, and what is live is the last promoted version.
"""

import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from scripts.tools.processes import Flower, Processes
from scripts.tools.repository import REPOSITORY
from scripts.tools.trial_site import LENIENT, wait_until
from server.bundle import export
from tests.toys.sites.site_process import SiteProcess

pytestmark = pytest.mark.e2e

SITES = ("clinic-a", "clinic-b")
TRAIN_S = 6.0
PLAN = {
    "quorum": 2, "rank": 8, "steps": 100000, "round-seconds": TRAIN_S, "grace-seconds": 240.0, "learning-rate": 1e-4,
}  # fmt: skip


class User:
    """Asks one site again and again; a failure is noted with its time."""

    def __init__(self, url: str) -> None:
        self.url, self.failures, self.answers = url, list[tuple[float, str]](), 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_asking, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(70)

    def failed_since(self, moment: float) -> list[str]:
        return [what for at, what in self.failures if at >= moment]

    def _keep_asking(self) -> None:
        body = {"model": "support", "prompt": "Return a list of", "max_tokens": 8, "temperature": 0}
        while not self._stop.is_set():
            try:
                httpx.post(f"{self.url}/v1/completions", json=body, timeout=60).raise_for_status()
                self.answers += 1
            except httpx.HTTPError as error:
                self.failures.append((time.monotonic(), repr(error)))
            self._stop.wait(0.3)


class Federation:
    """Two sites with a user each, Flower in its durable form, and the registry's record of what happened."""

    def __init__(self, folder: Path, sites: dict[str, SiteProcess], processes: Processes) -> None:
        self.folder, self.sites, self.processes = folder, sites, processes
        self.registry = folder / "registry"
        self.users = {name: User(site.url) for name, site in sites.items()}
        self.flower = Flower(processes, folder / "flower", durable=True)
        self.app = export(REPOSITORY, folder / "app")

    def start(self) -> None:
        self.flower.start_superlink()
        self.flower.start_superexec()
        for name in self.sites:
            self.start_supernode(name)

    def start_supernode(self, name: str) -> None:
        self.flower.start_supernode(name, self.sites[name].file)

    def run(self, rounds: int) -> None:
        self.flower.run(self.app, {"registry": self.registry, "rounds": rounds, **PLAN}, stream=False)

    def events(self, kind: str) -> list[dict[str, Any]]:
        path = self.registry / "events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [event for event in map(json.loads, lines) if event["event"] == kind]

    def wait_training(self, number: int) -> None:
        """Until both sites train in round `number`."""
        wait_until(lambda: any(event["round"] >= number for event in self.events("round.started")), f"round {number}")
        for site in self.sites.values():
            wait_until(lambda site=site: open_rounds(site), f"{site.folder.name} trains in round {number}")

    def wait_promoted(self, number: int) -> None:
        wait_until(lambda: self._promoted(number), f"round {number} promoted", 600)

    def _promoted(self, number: int) -> bool:
        """Return whether a round's version is live; one that failed or was rejected fails the test."""
        lost = [event for kind in ("round.failed", "round.rejected") for event in self.events(kind)]
        assert not [event for event in lost if event["round"] == number]
        return any(event["round"] == number for event in self.events("round.promoted"))

    def live(self) -> dict[str, str]:
        """Return the version that answers users, by site."""
        body = {"model": "support", "prompt": "x", "max_tokens": 1}
        replies = {name: site.users.post("/v1/completions", json=body) for name, site in self.sites.items()}
        return {name: reply.headers["x-umbel-adapter"] for name, reply in replies.items()}


@pytest.fixture
def federation(tiny_llama: Path) -> Iterator[Federation]:
    with tempfile.TemporaryDirectory(prefix="umbel-") as name:
        folder = Path(name)
        # Calm on two cores; and a verdict is not what this test is about.
        sites = {
            site: SiteProcess(folder / site, tiny_llama, site, extra=f"share_cap = 0.3\n{LENIENT}") for site in SITES
        }
        processes = Processes(folder / "logs")
        try:
            for site in sites.values():
                site.start()
            federation = Federation(folder, sites, processes)
            federation.start()
            yield federation
            for user in federation.users.values():
                user.stop()
        finally:
            for log in [*sorted(folder.glob("*/*.log")), folder / "registry" / "events.jsonl"]:
                if log.exists():  # shown where the test failed
                    print(f"--- {log}\n{log.read_text(errors='replace')[-3000:]}")
            processes.stop()
            for site in sites.values():
                site.stop()


def test_a_federation_outlives_every_kill(federation: Federation) -> None:
    a, b = SITES
    users, sites, processes = federation.users, federation.sites, federation.processes
    federation.run(rounds=4)

    federation.wait_training(1)
    for process_id in wait_until(lambda: processes.find("flwr-clientapp"), "a ClientApp"):
        kill(process_id)
    processes.kill(f"supernode-{b}")
    federation.start_supernode(b)
    federation.wait_promoted(1)

    federation.wait_training(2)
    processes.kill("flower-superlink")
    time.sleep(2)
    federation.flower.start_superlink()
    federation.wait_promoted(2)
    assert users[a].failures == users[b].failures == [], "nothing of Flower's concerns the users"

    federation.wait_training(3)
    sites[a].kill()
    sites[a].start()
    back = time.monotonic()
    federation.wait_promoted(3)
    assert users[a].failed_since(back) == []

    federation.wait_training(4)
    starts = sites[b].starts()
    struck = time.monotonic()
    kill(sites[b].engine_process().pid)
    sites[b].wait_ready(starts + 1)
    back = time.monotonic()
    federation.wait_promoted(4)
    assert users[b].failed_since(back) == []
    assert users[b].failures == [] or users[b].failures[0][0] >= struck
    assert users[a].failed_since(struck) == [], "the other site's users notice nothing"
    assert federation.live() == dict.fromkeys(SITES, "support@v4")

    # Flower ends the run of a dead ServerApp; the next run takes its round over.
    wait_until(lambda: federation.events("run.finished"), "the first run's end")
    federation.run(rounds=1)
    federation.wait_training(5)
    for process_id in processes.find("flwr-serverapp"):
        kill(process_id)
    assert federation.live() == dict.fromkeys(SITES, "support@v4")
    federation.run(rounds=1)
    federation.wait_promoted(5)
    assert federation.live() == dict.fromkeys(SITES, "support@v5")
    assert all(user.answers > 20 for user in users.values())


def open_rounds(site: SiteProcess) -> list[str]:
    try:
        rounds: list[str] = site.status()["open_rounds"]
        return rounds
    except httpx.TransportError:
        return []


def kill(process_id: int) -> None:
    os.kill(process_id, signal.SIGKILL)
