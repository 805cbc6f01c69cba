"""Rounds with real SuperNodes of mixed ranks, four of which do wrong in turn: poison, attack, come late, die.

Every round completes, the version is the mean of the honest sites, and its manifest names the others with the reason.
The sites train for real, but have no engine (plain_site.py). A fifth one is always honest: multi-Krum needs 2 f + 3.
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
import numpy as np
import numpy.typing as npt
import pytest

from scripts.tools.processes import FLOWER_BIN, Flower, Processes, free_port
from scripts.tools.repository import REPOSITORY
from scripts.tools.trial_site import LENIENT
from server.bundle import export
from umbel import peft_dir
from umbel.adapter import AdapterManifest
from umbel.site.template import site_toml

pytestmark = pytest.mark.e2e

RANKS = {"small": 4, "medium": 8, "large": 16, "largest": 32, "honest": 32}
FAULTS = {"medium": "flip@1", "small": "nan@2", "largest": "late@2", "large": "die@3"}
SETTINGS = {
    "rank": 32, "steps": 12, "batch-size": 16, "learning-rate": 2e-3, "round-seconds": 12.0, "straggler-seconds": 20.0,
    "grace-seconds": 240.0, "buffered": True,
}  # fmt: skip
Dense = dict[str, npt.NDArray[np.float64]]
"""Module → ΔW."""


class PlainFederation:
    """The four sites, Flower, and what the registry holds."""

    def __init__(self, folder: Path, model: Path, processes: Processes) -> None:
        self.folder, self.processes = folder, processes
        self.registry = folder / "registry"
        self.flower = Flower(processes, folder / "flower")
        self.app = export(REPOSITORY, folder / "app")
        for index, name in enumerate(RANKS):
            self.start_site(name, index, model)
        self.flower.start_superlink()
        for name in RANKS:
            processes.wait_for(lambda name=name: self.is_ready(name), f"{name}'s start", 300)
            self.flower.start_supernode(name, self.folder / name / "site.toml")

    def start_site(self, name: str, index: int, model: Path) -> None:
        folder = self.folder / name
        folder.mkdir()
        examples = [{"prompt": f"ward {i}", "completion": f"room {i * 7 % 13}"} for i in range(index, 400, len(RANKS))]
        (folder / "train.jsonl").write_text("\n".join(map(json.dumps, examples)))
        tables = {
            "model": {"served_name": "tiny"},
            "engine": {"dtype": "float32", "max_lora_rank": RANKS[name]},
            "training": {"seq_len": 32, "micro_batch": 8},
        }
        site_file = site_toml(tables, name=name, model=model, port=free_port())
        (folder / "site.toml").write_text(site_file + LENIENT)
        script = REPOSITORY / "tests" / "toys" / "sites" / "plain_site.py"
        command = [sys.executable, str(script), str(folder / "site.toml"), "--fault", FAULTS.get(name, "none@0")]
        self.processes.start(f"site-{name}", command, PYTHONPATH=str(REPOSITORY))

    def start_run(self, rounds: int, **settings: object) -> "subprocess.Popen[bytes]":
        return self.flower.run(self.app, {**SETTINGS, **settings, "registry": self.registry, "rounds": rounds})

    def wait_run(self, process: "subprocess.Popen[bytes]") -> None:
        """Until the run has come to its own end."""
        assert process.wait(400) == 0, self.log()
        assert self.events()[-1]["event"] == "run.finished", self.log()

    def wait_event(self, kind: str, number: int) -> None:
        def happened() -> bool:
            return any(event["event"] == kind and event["round"] == number for event in self.events())

        self.processes.wait_for(happened, f"{kind} of round {number}", 400)

    def events(self) -> list[dict[str, Any]]:
        path = self.registry / "events.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def log(self) -> str:
        """The end of what `flwr run` said."""
        return (self.processes.logs / "flwr.log").read_text()[-3000:]

    def show(self, version: int) -> str:
        """`umbel adapter show`."""
        command = [FLOWER_BIN / "umbel", "adapter", "show", f"support@v{version}", "--registry", self.registry]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    def version(self, number: int) -> tuple[Dense, AdapterManifest]:
        blob, manifest = peft_dir.read(self.registry / "support" / f"v{number:06d}")
        return dense(blob), manifest

    def change(self, name: str, round: int) -> Dense:
        """Return the change that a site learnt in a round: its update minus the parent that it had received."""
        (folder,) = (self.folder / name / "state" / "rounds" / "support").glob(f"*-{round}-*")
        before = dense((folder / "parent.safetensors").read_bytes())
        after = dense((folder / "update.safetensors").read_bytes())
        return {module: after[module] - before[module] for module in after}

    def socket(self, name: str) -> Path:
        return self.folder / name / "state" / "operator.sock"

    def is_ready(self, name: str) -> bool:
        try:
            with httpx.Client(transport=httpx.HTTPTransport(uds=str(self.socket(name)))) as control:
                return bool(control.get("http://site/status").json()["engine"]["ready"])
        except httpx.TransportError:
            return False


@pytest.fixture
def federation(tiny_llama: Path) -> Iterator[PlainFederation]:
    with tempfile.TemporaryDirectory(prefix="umbel-") as name:
        processes = Processes(Path(name) / "logs")
        try:
            yield PlainFederation(Path(name), tiny_llama, processes)
        finally:
            processes.stop()


def test_every_round_completes_with_the_honest_mean_and_names_who_is_not_in_it(federation: PlainFederation) -> None:
    federation.wait_run(federation.start_run(1, robust="multi_krum", byzantine=1, quorum=5))
    run = federation.start_run(2, quorum=3)
    federation.wait_event("round.trained", 2)
    (federation.folder / "largest" / "state" / "go").touch()
    federation.wait_run(run)
    first, second, third = (federation.version(number)[1] for number in (1, 2, 3))

    assert first.weights["medium"] == 0.0
    assert set(first.counts) == RANKS.keys() - {"medium"}
    assert first.left_out["medium"].startswith("multi_krum: ")
    require_near(federation, first, late=())

    assert set(second.weights) == {"medium", "large", "honest"}
    assert "NaN" in second.left_out["small"]
    assert second.left_out["largest"] == "no answer by the deadline; its late update counts in the next round"
    require_near(federation, second, late=())

    assert "large" not in third.weights
    assert third.left_out["large"].startswith("no answer by the deadline")
    assert third.site_metrics["largest"]["staleness"] == 1
    assert third.parents == (second.digest, first.digest)
    require_near(federation, third, late=("largest",))

    (end,) = (event for event in federation.events() if event["event"] == "round.promoted" and event["round"] == 3)
    assert 3 <= end["messages"]["honest"] <= 4, "an order, a version, a promotion; and once more where training is slow"

    for manifest in (first, second, third):
        shown = federation.show(manifest.version)
        assert all(name in shown and reason in shown for name, reason in manifest.left_out.items())


def require_near(federation: PlainFederation, manifest: AdapterManifest, late: tuple[str, ...]) -> None:
    """The version is its parent plus the mean step of the honest sites in it, as often as the mean site did, to 5 %."""
    before, after = (federation.version(number)[0] for number in (manifest.version - 1, manifest.version))
    counts = manifest.counts
    held = {name: count["held-examples"] / 2 ** (0.5 * (name in late)) for name, count in counts.items()}
    shares = {name: each / sum(held.values()) for name, each in held.items()}
    typical = sum(share * counts[name]["steps"] for name, share in shares.items())
    often = {name: share * typical / counts[name]["steps"] for name, share in shares.items()}
    changes = {name: federation.change(name, manifest.round - (name in late)) for name in counts}
    off = size = 0.0
    for module, parent in before.items():
        mean = parent + sum(often[name] * changes[name][module] for name in counts)
        off += float(((after[module] - mean) ** 2).sum())
        size += float((mean**2).sum())
    print(f"{manifest.ref}: {(off / size) ** 0.5:.2%} from the honest mean; weights {manifest.weights}")
    assert off / size <= 0.05**2


def dense(blob: bytes) -> Dense:
    pairs = peft_dir.factors(peft_dir.decode(blob))
    return {module: b.astype(np.float64) @ a.astype(np.float64) for module, (a, b) in pairs.items()}
