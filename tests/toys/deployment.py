"""A site's deployer with a real journal, supervisor, router and engine client; SGLang and training are toys."""

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

from client.adapter_bodies import AdapterBodies
from client.control import group_api, operator_api
from client.data.in_use import DataInUse
from client.data.prepare import Prepared
from client.held_base import HeldBase
from client.imported import child
from client.journal import Journal
from client.keys import SiteKeys
from client.versions import judging, loading
from client.versions import watch as watch_module
from client.versions.background import Background
from client.versions.deployer import Deployer
from client.versions.loading import Loading
from client.versions.serve_only import ServeOnly
from client.versions.served import Served
from serving import supervisor as supervisor_module
from serving.aliases import AliasTable
from serving.scores import Scores
from serving.supervisor import Supervisor
from tests.toys.engine import MEASURED, ToyEngine, ToyMachine, site_config
from tests.toys.sites.no_rounds import NoRounds
from umbel import peft_dir
from umbel.adapter import AdapterManifest, AdapterRef, Lifecycle
from umbel.base.fingerprint import BaseFingerprint
from umbel.errors import EngineGone, TrainingError
from umbel.faults import Point, reach
from umbel.messages import ShadowReport
from umbel.site.adapter_sections import ServeSection
from umbel.site.config import SiteConfig

PATIENCE_S = 10.0
RANK = 2
NOT_JUDGED = (Lifecycle.CANDIDATE, Lifecycle.PROBING, Lifecycle.WATCHING)
SHAPES = {"model.layers.0.self_attn.q_proj": (6, 5), "model.layers.0.self_attn.v_proj": (4, 5)}
BASE = BaseFingerprint(weights="w", config="c", quantization="q", tokenizer="t", chat_template="x")
HELD_BASE = HeldBase(BASE, kin="1" * 64)


def on(heldout: str) -> Prepared:
    """Data that nobody reads, with held-out examples of their own."""
    folder = Path(heldout)
    return Prepared(folder / "train.npy", folder / "eval.npy", 10, 5, 50, heldout=heldout)


class ToyJobs:
    """Evaluations whose loss a test sets; the adapter's file must be there."""

    def __init__(self) -> None:
        self.losses: dict[str, float] = {}
        """Engine name ("base" for the base), of a guard "NAME on GUARD" → loss per token; 1 where nothing is set."""
        self.gate: asyncio.Event | None = None
        self.gone = 0
        """Number of next evaluations that end because the engine dies."""
        self.asked: list[str] = []
        self.measured_on: list[str] = []
        """Digest of the held-out examples of each evaluation."""
        self.data = DataInUse(on("heldout"))

    async def evaluate(self, data: Prepared, folder: Path | None, guard: str | None = None) -> Scores:
        name = (folder.name if folder else "base") + (f" on {guard}" if guard else "")
        self.asked.append(name)
        self.measured_on.append(data.heldout)
        if self.gate is not None:
            await self.gate.wait()
        if self.gone:
            self.gone -= 1
            raise EngineGone("the engine went away")
        if folder is not None and not (folder / peft_dir.WEIGHTS).is_file():
            raise TrainingError(f"{folder} is not there")
        return scores(self.losses.get(name, 1.0))


class Deployment:
    """One run of a daemon over a state directory. A second one over the same directory is what follows a kill."""

    def __init__(
        self, state_dir: Path, machine: ToyMachine | None = None, serve: tuple[ServeSection, ...] = ()
    ) -> None:
        self.config: SiteConfig = site_config(state_dir).model_copy(update={"serve": serve})
        self.machine = machine or ToyMachine()
        self.jobs: Any = ToyJobs()
        self.journal = Journal(state_dir / "journal.sqlite3")
        self.served = Served(self.config, self.journal, SHAPES)
        self.supervisor = Supervisor(self.config, MEASURED, self.served)
        self.background = Background()
        self.loading = Loading(self.config, self.supervisor, self.served, self.background)
        self.deployer = self._deployer()
        self.serve_only = ServeOnly(self.config, self.supervisor, self.served, self.loading, self.background)
        self._running: asyncio.Task[None] | None = None

    def _deployer(self) -> Deployer:
        return Deployer(
            "support", config=self.config, journal=self.journal, served=self.served, supervisor=self.supervisor,
            loading=self.loading, background=self.background, jobs=self.jobs, base=HELD_BASE, shapes=SHAPES,
            keys=SiteKeys(self.config.site),
        )  # fmt: skip

    def resume(self) -> None:
        """Continue after a restart, as a site does before its engine is started."""
        self.served.forget_damaged()
        self.served.sweep()
        reach(Point.SWEPT)
        self.deployer.resume()

    async def __aenter__(self) -> "Deployment":
        self._running = asyncio.create_task(self.supervisor.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.background.close()
        assert self._running is not None
        self._running.cancel()
        await asyncio.gather(self._running, return_exceptions=True)
        await self.supervisor.stop()
        self.journal.close()

    @property
    def engine(self) -> ToyEngine:
        return self.machine.engines[-1]

    def table(self) -> AliasTable:
        """The alias table that the journal stands for now."""
        return self.served.table(self.supervisor.loaded)

    def after_a_kill(self) -> tuple[AliasTable, list[str]]:
        """Return the table and the versions that another daemon would serve if this one were killed now."""
        other = Deployment(self.config.site.state_dir)
        try:
            return other.table(), sorted(map(str, other.served.versions()))
        finally:
            other.journal.close()

    def push(self, version: int, **changes: Any) -> AdapterRef:
        blob = adapter(version)
        manifest = manifest_of(version, blob, **changes)
        self.deployer.receive(manifest, blob)
        return manifest.ref

    async def judged(self, ref: AdapterRef) -> ShadowReport:
        def ended() -> bool:
            return self.deployer.report(ref).state not in NOT_JUDGED

        await until(ended)
        return self.deployer.report(ref)

    async def deploy(self, version: int) -> AdapterRef:
        ref = self.push(version)
        await self.judged(ref)
        await self.deployer.promote(ref, forced=True)
        return ref

    async def ready(self, starts: int = 1) -> None:
        def answers() -> bool:
            if self._running is not None and self._running.done():
                self._running.result()  # raises what ended the supervisor
            return self.supervisor.engine is not None and self.supervisor.starts >= starts

        await until(answers)

    async def quiet(self) -> None:
        """Wait until nothing happens in the background any more."""
        await until(lambda: not len(self.background))

    async def users(self, *names: str, **body: Any) -> list[str]:
        """Send one request of each user; return the version that answered each, or "error"."""
        assert self.engine.router is not None
        chat = {"model": "support", "messages": [{"role": "user", "content": "hello"}], **body}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(self.engine.router), base_url="http://toy") as http:
            replies = [await http.post("/v1/chat/completions", json={**chat, "user": name}) for name in names]
        return [reply.headers["x-umbel-adapter"] if reply.status_code == 200 else "error" for reply in replies]

    def tenant(self, name: str, jobs: Any = None) -> Any:
        """Return what the control API asks of a tenant; raise NotFound for an adapter that this site does not train."""
        self.config.section(name)
        return SimpleNamespace(deployer=self.deployer, jobs=jobs or NoRounds(), keys=self.deployer._keys)

    def http(self, *, operator: bool = False) -> httpx.AsyncClient:
        """Return a client of the control API, on the ClientApp's socket or on the operator's."""

        site: Any = SimpleNamespace(
            config=self.config,
            tenant=self.tenant,
            keys=self.deployer._keys,
            bodies=AdapterBodies(1 << 20),
            serve_only=self.serve_only,
            tenants=self.config.adapters,
            stopping=False,
        )
        api = operator_api(site) if operator else group_api(site)
        return httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://site")


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.002)


def quick(monkeypatch: pytest.MonkeyPatch, machine: ToyMachine) -> None:
    """Replace engines by toys, and let nothing wait longer than it must."""
    monkeypatch.setattr(supervisor_module, "Engine", machine.engine)
    monkeypatch.setattr(supervisor_module, "RESTART_DELAY_S", 0.01)
    monkeypatch.setattr(loading, "DRAIN_POLL_S", 0.005)
    monkeypatch.setattr(loading, "NOTICE_S", 0.05)
    for module in (loading, judging):
        monkeypatch.setattr(module, "AGAIN_S", 0.01)
    monkeypatch.setattr(watch_module, "POLL_S", 0.005)
    monkeypatch.setattr(child, "make", child.made)


def run(state_dir: Path, machine: ToyMachine, story: Callable[[Deployment], Coroutine[Any, Any, None]]) -> None:
    """Tell a story of one daemon's run, from its start to its end."""

    async def main() -> None:
        async with asyncio.timeout(2 * PATIENCE_S), Deployment(state_dir, machine) as site:
            await site.ready(0)
            await story(site)

    asyncio.run(main())


def adapter(seed: int, dtype: Any = np.float32, rank: int = RANK, value: float | None = None) -> bytes:
    generator = np.random.default_rng(seed)
    tensors: peft_dir.Tensors = {}
    for module, (out, inner) in SHAPES.items():
        tensors[peft_dir.key(module, "A")] = generator.standard_normal((rank, inner)).astype(dtype)
        tensors[peft_dir.key(module, "B")] = generator.standard_normal((out, rank)).astype(dtype)
        if value is not None:
            tensors[peft_dir.key(module, "B")][0, 0] = value
    return peft_dir.encode(tensors)


def scores(loss: float, examples: int = 40, tokens: int = 10) -> Scores:
    """Return scores with the same loss per token (nats) on every example."""
    return Scores(np.full(examples, loss * tokens), np.full(examples, tokens, np.int32), np.zeros(examples, np.bool_))


def manifest_of(version: int, blob: bytes, **changes: Any) -> AdapterManifest:
    fields: dict[str, Any] = {
        "name": "support", "version": version, "digest": peft_dir.digest(blob), "base": BASE.digest, "lineage": "test",
        "round": version, "rank": RANK, "target_modules": ("q_proj", "v_proj"),
    }  # fmt: skip
    return AdapterManifest(**{**fields, **changes})
