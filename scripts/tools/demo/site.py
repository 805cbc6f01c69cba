"""`DemoSite`: one site of the demo, its file, its `umbel serve` and its control API."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from scripts.tools.demo.settings import Setting
from scripts.tools.processes import ENGINE_BIN, ProcessError, Processes, free_port
from umbel import signing
from umbel.messages import Hello, RoundOrder, Submit, TrainPlan
from umbel.peft_dir import digest
from umbel.site.config import OPERATOR_SOCKET
from umbel.site.template import Tables, site_toml

SHARE_CAP = 0.6
"""Share of an engine's time for training: on two cores, two engines, their users and all of Flower want the rest."""
ALONE = "/adapters/support/rounds/alone"


class DemoSite:
    """A site in `folder` that learns one task; with `keys` it takes only what the centre has signed."""

    def __init__(self, name: str, task: str, folder: Path, keys: Path | None, setting: Setting) -> None:
        self.name, self.task, self.folder, self._keys, self._setting = name, task, folder, keys, setting
        self.port = free_port()
        self.url, self.file = f"http://127.0.0.1:{self.port}", folder / "site.toml"
        transports = (httpx.HTTPTransport(uds=str(folder / "state" / name)) for name in ("site.sock", OPERATOR_SOCKET))
        self._control, self._operator = (
            httpx.Client(transport=transport, base_url="http://site", timeout=60) for transport in transports
        )

    def start(
        self, base: Path, data: tuple[Path, Path], processes: Processes,
        adapters: Mapping[str, tuple[Path, Path]] | None = None,
    ) -> None:  # fmt: skip
        """Write the site file, start `umbel serve`, and wait until its engine answers.

        `data` is the training file and the held-out file; `adapters`, adapter → the same of its own: without it
        `support` is the only one.
        """
        self.folder.mkdir()
        self.file.write_text(self._content(base, data, adapters or {}))
        processes.start(f"serve-{self.name}", [str(ENGINE_BIN / "umbel"), "serve", str(self.file)])
        processes.wait_for(lambda: bool(self.status().get("engine", {}).get("ready")), f"{self.name}'s start", 400)

    def status(self) -> dict[str, Any]:
        """Return the site's status; empty while it does not answer."""
        try:
            found: dict[str, Any] = self._operator.get("/status").json()
        except httpx.TransportError:
            return {}
        return found

    def training(self) -> dict[str, Any]:
        """Return the state of the training that is under way; empty while the site does not train."""
        job: dict[str, Any] = self.status().get("training") or {}
        return job if job.get("state") == "running" else {}

    def train_alone(self, parent: bytes, steps: int) -> None:
        """Order a round of the site's own, from the adapter `parent`, which no aggregation follows."""
        fingerprint = Hello.model_validate(
            self._control.get("/hello", params={"adapter": "support"}).json()
        ).fingerprint
        setting = self._setting
        plan = TrainPlan(
            rank=setting.rank, steps=steps, seconds=setting.alone_seconds, batch_size=setting.batch,
            learning_rate=setting.learning_rate,
        )  # fmt: skip
        order = RoundOrder(key="alone", base=fingerprint.digest, parent=digest(parent), round=0, plan=plan)
        headers = {"x-umbel-order": base64.b64encode(order.model_dump_json().encode()).decode()}
        if self._keys is not None:
            centre = signing.read_private(self._keys / "centre" / "signing.key")
            headers["x-umbel-signature"] = signing.sign(centre, Submit(adapter="support", order=order))
        self._control.post(ALONE, content=parent, headers=headers).raise_for_status()

    def trained_alone(self) -> Path | None:
        """Return the weights from `train_alone`, or None until they are there. Raises ProcessError if it failed."""
        report = self._control.get(ALONE).json()
        if report["state"] in ("skipped", "failed", "cancelled"):
            raise ProcessError(f"{self.name} could not train alone: {report['error']}")
        if report["state"] != "done":
            return None
        weights = self.folder / "alone.safetensors"
        weights.write_bytes(self._control.get(f"{ALONE}/update").content)
        return weights

    def _content(self, base: Path, data: tuple[Path, Path], adapters: Mapping[str, tuple[Path, Path]]) -> str:
        signed: dict[str, object] = {}
        if self._keys is not None:
            own = self._keys / f"site-{self.name}"
            signed = {"trusted_key": own / "centre-signing.pub", "signing_key": own / "updates.key"}
        setting = self._setting
        training = {"seq_len": setting.seq_len, "micro_batch": setting.batch, "share_cap": SHARE_CAP}
        tables: Tables = {
            "site": signed,
            "model": {"served_name": setting.served_name},
            **setting.tables,
            "engine.extra_args": {"max_total_tokens": 20000, "max_running_requests": 16},
            "training": {"eval_data": data[1], **training},
        }
        if adapters:
            sections = [{"name": name, "data": own[0], "eval_data": own[1]} for name, own in adapters.items()]
            tables = {**tables, "adapter": sections}
        why = {"engine.extra_args.max_total_tokens": "the engines of all sites share one small machine"}
        site_file = site_toml(tables, name=self.name, model=base, port=self.port, data=data[0], comments=why)
        return f"# Made by scripts/demo; docs/reference/configuration.md explains every line.\n{site_file}"
