"""A real site for tests: `umbel serve` in a process of its own, spoken to as Flower and users would."""

import base64
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from processes import free_port

from umbel import peft_dir
from umbel.adapter import AdapterManifest, AdapterRef
from umbel.base import LINEARS, BaseFingerprint, linear_shapes
from umbel.messages import RoundOrder, TrainPlan

RANK = 8
START_S = 300


class SiteProcess:
    """`umbel serve` over a tiny base; use as a context manager."""

    def __init__(
        self, folder: Path, model: Path, name: str = "clinic-a", data: str | None = None, extra: str = ""
    ) -> None:
        self.folder, self.model, self.port = folder, model, free_port()
        folder.mkdir(parents=True, exist_ok=True)
        examples = [{"prompt": f"ward {i}", "completion": f"room {i * 7 % 13}"} for i in range(40)]
        (folder / "train.jsonl").write_text(data or "\n".join(map(json.dumps, examples)))
        self.file = folder / "site.toml"
        self.file.write_text(f"""
[site]
name = "{name}"
state_dir = "state"
[model]
path = "{model}"
served_name = "tiny"
[[adapter]]
name = "support"
[engine]
port = {self.port}
dtype = "float32"
max_lora_rank = {RANK}
drain_s = 5
[engine.extra_args]
max_total_tokens = 20000
max_running_requests = 16
[engine.env]
OMP_NUM_THREADS = "1"
[training]
data = "train.jsonl"
seq_len = 32
micro_batch = 4
{extra}
""")
        self.log = folder / "serve.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.control = httpx.Client(
            transport=httpx.HTTPTransport(uds=str(folder / "state" / "site.sock")), base_url="http://site", timeout=60
        )
        self.url = f"http://127.0.0.1:{self.port}"
        self.users = httpx.Client(base_url=self.url, timeout=120)

    def __enter__(self) -> "SiteProcess":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "umbel.cli", "serve", str(self.file)], stdout=log, stderr=log
            )
        self.wait_ready()

    def wait_ready(self, starts: int = 1) -> None:
        """Until the engine answers, in at least its `starts`-th run under this daemon."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            assert self.process is not None
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                engine = self.control.get("/status").json()["engine"]
                if engine["ready"] and engine["starts"] >= starts:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.3)
        raise AssertionError(f"not ready in {START_S} s:\n{self.log.read_text()[-3000:]}")

    def stop(self) -> None:
        """Stop as systemd would; nothing of it may be left."""
        if self.process is None:
            return
        family = self.family()
        self.process.send_signal(signal.SIGTERM)
        try:
            assert self.process.wait(60) == 0, self.log.read_text()[-3000:]
        finally:
            left = psutil.wait_procs(family, timeout=20)[1]
            self.process = None
            for process in left:
                process.kill()
            assert not left, left

    def kill(self) -> list[psutil.Process]:
        """kill -9 of the daemon alone; the processes it had started."""
        assert self.process is not None
        family = self.family()
        self.process.kill()
        self.process.wait()
        self.process = None
        return family

    def family(self) -> list[psutil.Process]:
        assert self.process is not None
        return psutil.Process(self.process.pid).children(recursive=True)

    def engine_process(self) -> psutil.Process:
        return next(child for child in self.family() if "serving.launch" in " ".join(child.cmdline()))

    def manifest(self, version: int, blob: bytes, **changes: Any) -> AdapterManifest:
        fields: dict[str, Any] = {
            "name": "support",
            "version": version,
            "digest": peft_dir.digest(blob),
            "base": BaseFingerprint.of(self.model).digest,
            "lineage": "test",
            "round": version,
            "rank": RANK,
            "target_modules": LINEARS,
        }
        return AdapterManifest(**{**fields, **changes})

    def push(self, manifest: AdapterManifest, blob: bytes) -> httpx.Response:
        header = base64.b64encode(manifest.model_dump_json().encode()).decode()
        return self.control.post(
            f"/adapters/{manifest.name}/shadow", content=blob, headers={"x-umbel-manifest": header}
        )

    def deploy(self, version: int, blob: bytes) -> AdapterRef:
        """Push a version, wait for its verdict and promote it whatever that is: the operator may."""
        manifest = self.manifest(version, blob)
        assert self.push(manifest, blob).status_code == 200
        self.wait_judged(manifest.ref)
        reply = self.control.post(f"/adapters/{manifest.ref}/promote?forced=true")
        assert reply.status_code == 200, reply.text
        return manifest.ref

    def wait_judged(self, ref: AdapterRef) -> dict[str, Any]:
        while True:
            report: dict[str, Any] = self.control.get(f"/adapters/{ref}/shadow").json()
            if report["state"] in ("judged", "live", "rejected", "retired"):
                return report
            time.sleep(0.2)

    def submit(self, key: str, blob: bytes, **plan: Any) -> httpx.Response:
        order = RoundOrder(
            key=key,
            base=BaseFingerprint.of(self.model).digest,
            parent=peft_dir.digest(blob),
            round=1,
            plan=TrainPlan(**{"rank": RANK, "steps": 4, "seconds": 120, **plan}),
        )
        header = base64.b64encode(order.model_dump_json().encode()).decode()
        return self.control.post(f"/adapters/support/rounds/{key}", content=blob, headers={"x-umbel-order": header})

    def wait_round(self, key: str) -> dict[str, Any]:
        while True:
            report: dict[str, Any] = self.control.get(f"/adapters/support/rounds/{key}").json()
            if report["state"] in ("done", "failed", "cancelled"):
                return report
            time.sleep(0.2)


def random_adapter(model: Path, seed: int, b_std: float = 0.3) -> bytes:
    """A canonical adapter that changes what the base says (b_std = 0: one that does not)."""
    generator = np.random.default_rng(seed)
    tensors: peft_dir.Tensors = {}
    for module, (out_features, in_features) in linear_shapes(model, LINEARS).items():
        a = generator.standard_normal((RANK, in_features)) / np.sqrt(in_features)
        tensors[peft_dir.key(module, "A")] = a.astype(np.float32)
        tensors[peft_dir.key(module, "B")] = (generator.standard_normal((out_features, RANK)) * b_std).astype(
            np.float32
        )
    return peft_dir.encode(tensors)


def kill(process: psutil.Process) -> None:
    os.kill(process.pid, signal.SIGKILL)
