"""`TrialSite`: the site of end-to-end tests, benchmarks and rehearsals: its file, its adapters and its control API.

It starts no process: whoever uses it runs `umbel serve` over the site file.
"""

import base64
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from scripts.tools.processes import ProcessError, free_port
from umbel import peft_dir
from umbel.adapter import AdapterManifest, AdapterRef
from umbel.base.fingerprint import BaseFingerprint
from umbel.base.shapes import LINEARS, linear_shapes
from umbel.messages import RoundOrder, TrainPlan
from umbel.site.config import OPERATOR_SOCKET
from umbel.site.template import Tables, site_toml

RANK = 8
PATIENCE_S = 400.0
LENIENT = """
[shadow]
max_loss_ratio = 100.0
max_exact_drop = 1.0
min_examples = 1
"""
"""End of a site file under which random adapters are promoted."""
SETTINGS: Tables = {
    "model": {"served_name": "tiny"},
    "engine": {"dtype": "float32", "max_lora_rank": RANK, "drain_s": 5},
    "engine.extra_args": {"max_total_tokens": 20000, "max_running_requests": 16},
    "training": {"seq_len": 32, "micro_batch": 4},
}
"""Tables of the site file that differ from the defaults: small enough for two cores."""


class TrialSite:
    """A tiny site in `folder`, asked as the centre and an operator ask a site; `extra` is the end of its site file."""

    def __init__(
        self, folder: Path, model: Path, name: str = "clinic-a", data: str | None = None, extra: str = ""
    ) -> None:
        self.folder, self.model, self.port = folder, model, free_port()
        self.url, self.state_dir, self.file = f"http://127.0.0.1:{self.port}", folder / "state", folder / "site.toml"
        folder.mkdir(parents=True, exist_ok=True)
        examples = [{"prompt": f"ward {i}", "completion": f"room {i * 7 % 13}"} for i in range(40)]
        (folder / "train.jsonl").write_text(data or "\n".join(map(json.dumps, examples)))
        self.file.write_text(f"{site_toml(SETTINGS, name=name, model=model, port=self.port)}{extra}\n")
        self.control, self.operator = self._client("site.sock"), self._client(OPERATOR_SOCKET)
        self._base = BaseFingerprint.of(model).digest

    def status(self) -> dict[str, Any]:
        """Return what `umbel status --json` shows; raise httpx.TransportError while the daemon does not answer."""
        found: dict[str, Any] = self.operator.get("/status").json()
        return found

    def starts(self) -> int:
        """Return how often this daemon's engine has started; 0 while it does not answer."""
        try:
            engine = self.status()["engine"]
        except httpx.TransportError:
            return 0
        return int(engine["starts"]) if engine["ready"] else 0

    def live(self, adapter: str = "support") -> str:
        """Return the version that answers users of an adapter, or `base` where none does."""
        return str(self.status()["aliases"][adapter]["live"] or "base")

    def manifest(self, version: int, blob: bytes, **changes: Any) -> AdapterManifest:
        """Return the manifest that a centre would send with `support@v<version>`, with `changes`."""
        fields: dict[str, Any] = {
            "name": "support", "version": version, "digest": peft_dir.digest(blob), "base": self._base,
            "lineage": "test", "round": version, "rank": RANK, "target_modules": LINEARS,
        }  # fmt: skip
        return AdapterManifest(**{**fields, **changes})

    def push(self, manifest: AdapterManifest, blob: bytes) -> httpx.Response:
        """Push a version to the site as a shadow."""
        return self._post(f"/adapters/{manifest.name}/shadow", blob, {"x-umbel-manifest": manifest})

    def wait_judged(self, ref: AdapterRef) -> dict[str, Any]:
        """Wait for a version's verdict; return its report."""
        return self._wait(f"/adapters/{ref}/shadow", ("judged", "live", "rejected", "retired"))

    def offer(self, version: int, blob: bytes, **changes: Any) -> AdapterRef:
        """Push a version and wait for its verdict; raise ProcessError if the site refuses to take it."""
        manifest = self.manifest(version, blob, **changes)
        require_done(self.push(manifest, blob))
        self.wait_judged(manifest.ref)
        return manifest.ref

    def promote(self, ref: AdapterRef) -> httpx.Response:
        """Promote a version as the operator, whatever its verdict is."""
        return self.operator.post(f"/adapters/{ref}/promote?forced=true")

    def discard(self, ref: AdapterRef) -> httpx.Response:
        """Discard a shadow."""
        return self.control.post(f"/adapters/{ref}/discard")

    def roll_back(self) -> httpx.Response:
        """Go back to the version that answered before, as the operator."""
        return self.operator.post("/adapters/support/rollback")

    def submit(
        self, key: str, blob: bytes, number: int = 1, *, adapter: str = "support", **plan: Any
    ) -> httpx.Response:
        """Order a round of training that starts from the adapter `blob`; `plan` changes the default plan."""
        order = RoundOrder(
            key=key, base=self._base, parent=peft_dir.digest(blob), round=number,
            plan=TrainPlan(**{"rank": RANK, "steps": 4, "seconds": 120, **plan}),
        )  # fmt: skip
        return self._post(f"/adapters/{adapter}/rounds/{key}", blob, {"x-umbel-order": order})

    def wait_round(self, key: str, adapter: str = "support") -> dict[str, Any]:
        """Wait for a round's end; return its report."""
        return self._wait(f"/adapters/{adapter}/rounds/{key}", ("done", "skipped", "failed", "cancelled"))

    def _client(self, socket: str) -> httpx.Client:
        transport = httpx.HTTPTransport(verify=False, uds=str(self.state_dir / socket))
        return httpx.Client(transport=transport, base_url="http://site", timeout=120)

    def _post(self, path: str, blob: bytes, header: dict[str, BaseModel]) -> httpx.Response:
        coded = {key: base64.b64encode(message.model_dump_json().encode()).decode() for key, message in header.items()}
        return self.control.post(path, content=blob, headers=coded)

    def _wait(self, path: str, states: tuple[str, ...]) -> dict[str, Any]:
        def report() -> dict[str, Any] | None:
            found: dict[str, Any] = self.control.get(path).raise_for_status().json()
            return found if found["state"] in states else None

        ended: dict[str, Any] = wait_until(report, f"{path}: the end")
        return ended


def require_done(reply: httpx.Response) -> None:
    """Raise ProcessError unless the site did what it was asked for."""
    if reply.is_error:
        raise ProcessError(f"{reply.request.url.path}: {reply.text}")


def random_adapter(model: Path, seed: int, b_std: float = 0.3, dtype: npt.DTypeLike = np.float32) -> bytes:
    """Return the bytes of an adapter that changes the base's answers (b_std = 0: one that does not)."""
    generator = np.random.default_rng(seed)
    tensors: peft_dir.Tensors = {}
    for module, (out_features, in_features) in linear_shapes(model, LINEARS).items():
        a = generator.standard_normal((RANK, in_features)) / in_features**0.5
        b = generator.standard_normal((out_features, RANK)) * b_std
        tensors[peft_dir.key(module, "A")] = a.astype(dtype)
        tensors[peft_dir.key(module, "B")] = b.astype(dtype)
    return peft_dir.encode(tensors)


def wait_until(condition: Callable[[], Any], what: str, seconds: float = PATIENCE_S) -> Any:
    """Poll a condition and return its first true value; raise ProcessError after so many seconds."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise ProcessError(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.2)
    return value
