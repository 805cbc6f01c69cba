"""One site of the demo: its file, `umbel serve`, and what is asked of its control API."""

import base64
from pathlib import Path
from typing import Any

import httpx

from scripts.tools.processes import ENGINE_BIN, ProcessError, Processes, free_port
from umbel import signing
from umbel.messages import Hello, RoundOrder, Submit, TrainPlan
from umbel.peft_dir import digest

RANK, BATCH, SEQ_LEN = 8, 8, 48
SHARE_CAP = 0.6
"""Calm on two cores: two engines, their users and all of Flower share them."""
ALONE = "/adapters/support/rounds/alone"


class DemoSite:
    """A site in `folder`, which learns one task; with `keys` it trains nothing but what the centre signed."""

    def __init__(self, name: str, task: str, folder: Path, keys: Path | None) -> None:
        self.name, self.task, self.folder, self._keys = name, task, folder, keys
        self.port = free_port()
        self.url, self.file = f"http://127.0.0.1:{self.port}", folder / "site.toml"
        self._socket = httpx.HTTPTransport(uds=str(folder / "state" / "site.sock"))
        self._control = httpx.Client(transport=self._socket, base_url="http://site", timeout=60)

    def start(self, base: Path, data: tuple[Path, Path], processes: Processes) -> None:
        """`umbel serve`, until its engine answers."""
        self.folder.mkdir()
        self.file.write_text(self._content(base, data))
        processes.start(f"serve-{self.name}", [str(ENGINE_BIN / "umbel"), "serve", str(self.file)])
        processes.wait_for(lambda: bool(self.status().get("engine", {}).get("ready")), f"{self.name}'s start", 400)

    def status(self) -> dict[str, Any]:
        """The site's status, or nothing while it does not answer."""
        try:
            found: dict[str, Any] = self._control.get("/status").json()
        except httpx.TransportError:
            return {}
        return found

    def training(self) -> dict[str, Any]:
        """How its training stands; nothing while it does not train."""
        job: dict[str, Any] = self.status().get("training") or {}
        return job if job.get("state") == "running" else {}

    def train_alone(self, parent: bytes, steps: int, learning_rate: float) -> None:
        """Begin what it would have learnt without the others."""
        fingerprint = Hello.model_validate(self._control.get("/hello").json()).fingerprint
        plan = TrainPlan(rank=RANK, steps=steps, seconds=600, batch_size=BATCH, learning_rate=learning_rate)
        order = RoundOrder(key="alone", base=fingerprint.digest, parent=digest(parent), round=0, plan=plan)
        headers = {"x-umbel-order": base64.b64encode(order.model_dump_json().encode()).decode()}
        if self._keys is not None:
            centre = signing.read_private(self._keys / "centre" / "signing.key")
            headers["x-umbel-signature"] = signing.sign(centre, Submit(adapter="support", order=order))
        self._control.post(ALONE, content=parent, headers=headers).raise_for_status()

    def trained_alone(self) -> Path | None:
        """The adapter that this led to, once it is there; raises ProcessError when it came to nothing."""
        report = self._control.get(ALONE).json()
        if report["state"] in ("failed", "cancelled"):
            raise ProcessError(f"{self.name} could not train alone: {report['error']}")
        if report["state"] != "done":
            return None
        weights = self.folder / "alone.safetensors"
        weights.write_bytes(self._control.get(f"{ALONE}/update").content)
        return weights

    def _content(self, base: Path, data: tuple[Path, Path]) -> str:
        signed = ""
        if self._keys is not None:
            own = self._keys / f"site-{self.name}"
            signed = f'trusted_key = "{own / "centre-signing.pub"}"\nsigning_key = "{own / "updates.key"}"\n'
        return f"""# Made by scripts/demo; docs/configuration.md explains every line.
[site]
name = "{self.name}"
state_dir = "state"
{signed}
[model]
path = "{base}"
served_name = "tiny"

[[adapter]]
name = "support"

[engine]
port = {self.port}
dtype = "float32"
max_lora_rank = {RANK}

[engine.extra_args]      # two engines share one small machine
max_total_tokens = 20000
max_running_requests = 16

[engine.env]
OMP_NUM_THREADS = "1"

[training]
data = "{data[0]}"
eval_data = "{data[1]}"
seq_len = {SEQ_LEN}
micro_batch = {BATCH}
share_cap = {SHARE_CAP}
"""
