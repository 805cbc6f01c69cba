"""A real site that is killed at fault points, and the user who notices: for scripts/kill_matrix.py."""

import base64
import itertools
import json
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from processes import ENGINE_BIN, REPOSITORY, ProcessError, Processes, free_port

from umbel import peft_dir
from umbel.adapter import AdapterManifest, AdapterRef, Personal
from umbel.base import LINEARS, BaseFingerprint, linear_shapes
from umbel.messages import RoundOrder, TrainPlan

RANK = 8
PATIENCE_S = 240.0
SITE_FILE = """
[site]
name = "clinic-a"
state_dir = "state"
[model]
path = "{model}"
served_name = "base"
[[adapter]]
name = "support"
[engine]
port = {port}
dtype = "float32"
max_lora_rank = {rank}
[engine.env]
OMP_NUM_THREADS = "1"
[training]
data = "train.jsonl"
seq_len = 32
micro_batch = 4
[shadow]        # verdicts are not what is rehearsed here
max_loss_ratio = 100.0
max_exact_drop = 1.0
min_examples = 1
"""


class User:
    """Asks `support` again and again; every answer is kept with its time and the version that gave it."""

    def __init__(self, url: str) -> None:
        self._url, self._answers = url, list[tuple[float, str]]()
        threading.Thread(target=self._keep_asking, daemon=True).start()

    def answered_since(self, moment: float) -> list[tuple[float, str]]:
        """(time, version) of each answer that began after `moment`; `base` where no version gave it."""
        return [answer for answer in self._answers if answer[0] >= moment]

    def longest_silence(self, since: float, until: float) -> float:
        """Seconds between two answers, at most."""
        times = [since, *(at for at, _ in self._answers if since <= at <= until), until]
        return max(after - before for before, after in itertools.pairwise(times))

    def _keep_asking(self) -> None:
        body = {"model": "support", "prompt": "Return a list of", "max_tokens": 2, "temperature": 0}
        while True:
            began = time.monotonic()
            try:
                reply = httpx.post(f"{self._url}/v1/completions", json=body, timeout=30).raise_for_status()
                self._answers.append((began, reply.headers.get("x-umbel-adapter", "base")))
            except httpx.HTTPError:
                pass  # a silence; how long it lasts is what is measured
            time.sleep(0.2)


class Site:
    """`umbel serve`, and what the centre and an operator ask of it."""

    def __init__(self, folder: Path, model: Path, processes: Processes) -> None:
        self.folder, self._model, self._processes, port = folder, model, processes, free_port()
        folder.mkdir(parents=True)
        examples = [{"prompt": f"ward {i}", "completion": f"room {i * 7 % 13}"} for i in range(24)]
        (folder / "train.jsonl").write_text("\n".join(map(json.dumps, examples)))
        (folder / "site.toml").write_text(SITE_FILE.format(model=model, port=port, rank=RANK))
        self.state_dir = folder / "state"
        self.log = processes.logs / "serve.log"
        self.user = User(f"http://127.0.0.1:{port}")
        self._control = httpx.Client(
            transport=httpx.HTTPTransport(uds=str(self.state_dir / "site.sock")),
            base_url="http://site",
            timeout=PATIENCE_S,
        )
        self._base = BaseFingerprint.of(model).digest
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, die_at: str = "") -> None:
        """Start the daemon; it dies at a fault point, if one is given."""
        command = [str(ENGINE_BIN / "python"), "-m", "umbel.cli", "serve", str(self.folder / "site.toml")]
        plan = {"UMBEL_DIE_AT": die_at} if die_at else {}
        self._process = self._processes.start("serve", command, PYTHONPATH=str(REPOSITORY), **plan)

    def wait_ready(self, starts: int = 1) -> None:
        """Until the engine answers, in at least its `starts`-th run under this daemon."""
        wait_until(lambda: self.dead() or self.starts() >= starts, "the engine")
        if self.dead():
            raise ProcessError(f"the site ended while it was starting; see {self.log}")

    def starts(self) -> int:
        """How often this daemon's engine has started; 0 while it does not answer."""
        try:
            engine = self.status()["engine"]
        except httpx.TransportError:
            return 0
        return int(engine["starts"]) if engine["ready"] else 0

    def dead(self) -> bool:
        return self._process is not None and self._process.poll() is not None

    def wait_dead(self) -> None:
        """Until the daemon has died, which has to be by SIGKILL."""
        wait_until(self.dead, "the site's death")
        if self._process is None or self._process.returncode != -9:
            raise ProcessError(f"the site ended by itself; see {self.log}")

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self._control.get("/status").json()
        return found

    def live(self) -> str:
        return str(self.status()["aliases"]["support"]["live"] or "base")

    def settled(self) -> bool:
        """Whether nothing is waiting for a verdict or its training."""
        status = self.status()
        states = {report["state"] for report in status["versions"].values()}
        return not status["open_rounds"] and not states & {"validating", "probing"}

    def push(self, version: int) -> str:
        """Push a version and wait for its verdict."""
        blob = random_adapter(self._model, version)
        manifest = AdapterManifest(
            name="support", version=version, digest=peft_dir.digest(blob), base=self._base, lineage="test",
            round=version, rank=RANK, target_modules=LINEARS,
        )  # fmt: skip
        self._post("/adapters/support/shadow", blob, "x-umbel-manifest", manifest.model_dump_json())
        ref = str(AdapterRef("support", version))
        wait_until(lambda: self._report(ref)["state"] not in ("validating", "probing"), f"the verdict on {ref}")
        return ref

    def promote(self, ref: str) -> None:
        self._post(f"/adapters/{ref}/promote")

    def discard(self, ref: str) -> None:
        self._post(f"/adapters/{ref}/discard")

    def roll_back(self) -> None:
        self._post("/adapters/support/rollback")

    def train(self, number: int, personal: Personal | None = None) -> None:
        """Train a round and wait for its end."""
        blob = random_adapter(self._model, 0)
        plan = TrainPlan(rank=RANK, steps=2, seconds=120, personal=personal)
        key = f"test-{number}-r"
        order = RoundOrder(key=key, base=self._base, parent=peft_dir.digest(blob), round=number, plan=plan)
        self._post(f"/adapters/support/rounds/{key}", blob, "x-umbel-order", order.model_dump_json())
        wait_until(lambda: self._get(f"/adapters/support/rounds/{key}")["state"] == "done", f"round {key}")

    def _report(self, ref: str) -> dict[str, Any]:
        return self._get(f"/adapters/{ref}/shadow")

    def _get(self, path: str) -> dict[str, Any]:
        found: dict[str, Any] = self._control.get(path).raise_for_status().json()
        return found

    def _post(self, path: str, blob: bytes = b"", header: str = "x-umbel-nothing", message: str = "") -> None:
        headers = {header: base64.b64encode(message.encode()).decode()}
        reply = self._control.post(path, content=blob, headers=headers)
        if reply.is_error:
            raise ProcessError(f"{path}: {reply.text}")


def random_adapter(model: Path, seed: int) -> bytes:
    """A canonical adapter that changes what the base says by a little."""
    generator = np.random.default_rng(seed)
    tensors: peft_dir.Tensors = {}
    for module, (out_features, in_features) in linear_shapes(model, LINEARS).items():
        for factor, shape in (("A", (RANK, in_features)), ("B", (out_features, RANK))):
            tensors[peft_dir.key(module, factor)] = (generator.standard_normal(shape) * 0.05).astype(np.float32)
    return peft_dir.encode(tensors)


def wait_until(condition: Any, what: str) -> None:
    """Poll until `condition`; raise ProcessError when time is up."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise ProcessError(f"{what} took longer than {PATIENCE_S:.0f} s")
        time.sleep(0.2)
