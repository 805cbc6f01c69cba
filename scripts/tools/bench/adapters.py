"""Measures several adapters on one base: latencies beside stock SGLang with the same adapters, and what is trained.

For each number of adapters a site over the tiny base and stock SGLang with the site's flags run at the same time. They
answer by turns (ABBA, blocks of a few seconds), and whoever has no turn sleeps; what it computes then is measured and
printed. The same users, an open loop, ask for all adapters alike. Half-way the site trains: a round of every adapter is
open, and the same requests come again with other prompts, so that no cache knows them.
"""

import argparse
import asyncio
import dataclasses
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import psutil

from scripts.tools import tiny_base
from scripts.tools.bench.adapters_figures import Block, Row, System, Trained, show
from scripts.tools.bench.overlap import DRAIN_S, PROMPT_IDS, REQUEST, SETTLE_S, TARGETS
from scripts.tools.processes import ENGINE_BIN, ProcessError, Processes, end_as_ctrl_c
from scripts.tools.repository import REPOSITORY
from scripts.tools.trial_site import LENIENT, RANK, TrialSite, random_adapter, require_done
from serving.bench.load import Client
from serving.bench.processes.core_use import core_use
from serving.bench.processes.testbed import StockServer, family_of, scheduler_of
from serving.bench.trace import Arrival
from serving.run_dir import ADMIN_KEY
from serving.trainer_socket import CoTrainerClient, CoTrainerStatus, socket_path
from umbel.adapter import AdapterRef, EngineRef
from umbel.base.shapes import LINEARS, read_config
from umbel.site.config import SiteConfig
from umbel.site.memory import FP32, lora_elements

LEAD_S = 0.3
"""From a block's first request, which is not counted, to its others: an engine that slept is awake then."""
WARM_UP = 1_000_000
"""Seed of the prompts that are not counted."""


@dataclass(frozen=True)
class Load:
    """Users of one number of adapters: for each system `pairs` blocks of so many seconds, `rate` requests a second."""

    pairs: int
    rate: float
    seconds: float

    def block(self, number: int) -> list[Arrival]:
        """Draw a Poisson process of as many requests as are due on average, and one at the time 0."""
        rng = np.random.default_rng(number)
        times = np.sort(rng.uniform(LEAD_S, LEAD_S + self.seconds, round(self.rate * self.seconds)))
        return [dataclasses.replace(REQUEST, at=float(at)) for at in (0.0, *times)]


FULL, QUICK = Load(pairs=8, rate=4.0, seconds=4.0), Load(pairs=2, rate=4.0, seconds=4.0)


def main() -> None:
    """Measure all numbers of adapters and print the tables."""
    end_as_ctrl_c()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1 and 2 adapters, few requests: it shows that all works")
    parser.add_argument("--adapters", type=int, nargs="+", help="how many; default: 1 2 4 8 16")
    parser.add_argument("--pairs", type=int, help="blocks of each system; default: 8")
    parser.add_argument("--json", type=Path, help="file for all figures, every request's included")
    options = parser.parse_args()
    load, counts = (QUICK, [1, 2]) if options.quick else (FULL, [1, 2, 4, 8, 16])
    load = dataclasses.replace(load, pairs=options.pairs or load.pairs)
    rows = []
    with tempfile.TemporaryDirectory(prefix="umbel-") as name:
        for count in sorted(options.adapters or counts):  # a site that grows: what it prepared and judged stays
            began = time.perf_counter()
            processes = Processes(Path(name) / "logs")
            try:
                rows.append(asyncio.run(measure(Path(name), count, processes, load)))
            finally:
                processes.stop()
            print(f"{count} adapters: measured in {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    if options.json:
        options.json.write_text(json.dumps([row.model_dump() for row in rows]))
    print(f"per number of adapters and system {load.pairs} blocks of {load.seconds:g} s at {load.rate:g} requests/s; "
          f"requests of {REQUEST.prompt} + {REQUEST.output} tokens, rank {RANK}\n")  # fmt: skip
    print(show(rows))


async def measure(folder: Path, count: int, processes: Processes, load: Load) -> Row:
    """Start a site with so many adapters, and stock SGLang beside it; return all figures."""
    names = ["support", *(f"tenant-{number}" for number in range(2, count + 1))]
    tables = "".join(f'[[adapter]]\nname = "{name}"\n' for name in names[1:])
    base = tiny_base.build(REPOSITORY / ".cache" / "tiny-base")
    site = TrialSite(folder / "site", base, "bench", extra=tables + LENIENT + TARGETS)
    daemon = processes.start("site", [str(ENGINE_BIN / "umbel"), "serve", str(site.file)])
    processes.wait_for(site.starts, "the site's start", 400)
    for seed, name in enumerate(names, start=1):
        if site.live(name) == "base":
            site.promote(site.offer(1, random_adapter(base, seed), name=name)).raise_for_status()
    config = SiteConfig.load(site.file)
    refs = [AdapterRef(name, 1) for name in names]
    folders: dict[EngineRef, Path] = {ref: site.state_dir / "adapters" / ref.engine_name for ref in refs}
    stock = StockServer(config, folders, (site.state_dir / ADMIN_KEY).read_text().strip())
    users = {
        "umbel": Users(site.url, names),
        "stock": Users(stock.url, [f"{config.model.served_name}:{ref.engine_name}" for ref in refs], stock.key),
    }
    try:
        await stock.start()
        both = Both(users, {"umbel": family_of(daemon.pid), "stock": family_of(stock.pid)}, load)
        trained = await both.measure(site, names)
    finally:
        await stock.stop()
        for each in users.values():
            await each.close()
    return Row(
        adapters=count, slots=config.slots, slot_bytes=FP32 * lora_elements(read_config(base), RANK, LINEARS),
        blocks=both.blocks, trained=trained, private_bytes=both.private_bytes,
        idle={system: max(shares) for system, shares in both.idle.items()},
    )  # fmt: skip


def dealt(workload: Sequence[Arrival], count: int, first: int) -> list[Sequence[Arrival]]:
    """Deal requests out to `count` adapters in turn, beginning with number `first` of them, round and round."""
    return [workload[(place - first) % count :: count] for place in range(count)]


class Users:
    """The users of one engine, who ask for its adapters, `models`, in turn."""

    def __init__(self, url: str, models: Sequence[str], key: str | None = None) -> None:
        self._models = models
        self._clients = [Client(url, model, PROMPT_IDS, key) for model in models]
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.AsyncClient(base_url=url, headers=headers, timeout=DRAIN_S, trust_env=False)

    async def texts(self) -> list[str]:
        """Return the greedy answer of each adapter to one prompt."""
        fixed = {"prompt": list(PROMPT_IDS[:20]), "max_tokens": REQUEST.output, "temperature": 0, "ignore_eos": True}
        replies = [await self._http.post("/v1/completions", json={"model": model, **fixed}) for model in self._models]
        return [reply.raise_for_status().json()["choices"][0]["text"] for reply in replies]

    async def ask(self, workload: Sequence[Arrival], number: int, prompts: int) -> Block:
        """Send block `number`, whose requests go round the adapters; `prompts` seeds what they ask.

        Raises ProcessError where one is not answered in full.
        """
        count, began = len(self._clients), time.perf_counter()
        parts = [
            client.run(part, prompts * count + place, DRAIN_S, began)
            for place, (client, part) in enumerate(zip(self._clients, dealt(workload, count, number), strict=True))
        ]
        outcomes = [outcome for part in await asyncio.gather(*parts) for outcome in part]
        for outcome in outcomes:
            if not outcome.ok:
                raise ProcessError(f"a request was not answered: {outcome}")
        return Block.of(sorted(outcomes, key=lambda outcome: outcome.arrival.at))

    async def close(self) -> None:
        for client in self._clients:
            await client.close()
        await self._http.aclose()


class Both:
    """A site and stock SGLang beside it, which answer the same users by turns; and what is found."""

    def __init__(self, users: dict[str, Users], families: dict[str, list[psutil.Process]], load: Load) -> None:
        self._users, self._families, self._load = users, families, load
        self.blocks: dict[System, list[Block]] = defaultdict(list)
        self.idle: dict[System, list[float]] = defaultdict(list)
        """Part of a core, of all processes of a system, while the other one had the turn: block by block."""
        self.private_bytes: dict[System, int] = {}

    async def measure(self, site: TrialSite, names: Sequence[str]) -> Trained:
        """Ask both by turns, then the site while it trains, then both again; return what was trained.

        Raises ProcessError where the two do not give the same greedy answers.
        """
        answers = {system: await users.texts() for system, users in self._users.items()}
        if answers["stock"] != answers["umbel"]:
            raise ProcessError(f"stock SGLang and umbel answer differently with the same adapters: {answers}")
        for place, users in enumerate(self._users.values()):
            await users.ask(self._load.block(WARM_UP), 0, WARM_UP + place)
        half = self._load.pairs // 2
        for number in range(half):
            await self._pair(number)
        self._weigh("stock", "stock")
        self._weigh("umbel", "umbel")
        trained = await self._train(site, names)
        for number in range(half, self._load.pairs):
            await self._pair(number)
        return trained

    async def _pair(self, number: int) -> None:
        order: tuple[System, System] = ("stock", "umbel") if number % 2 == 0 else ("umbel", "stock")
        for system, other in (order, order[::-1]):
            with core_use(*self._families[other]) as use:
                block = await self._users[system].ask(self._load.block(number), number, number)
            self.blocks[system].append(block)
            self.idle[other].append(sum(use.processes))

    async def _train(self, site: TrialSite, names: Sequence[str]) -> Trained:
        """Open a round of every adapter, ask all blocks, and cancel the rounds."""
        trainer, key = CoTrainerClient(socket_path(site.state_dir)), f"bench-{len(names)}"
        parent = random_adapter(site.model, seed=7, b_std=0.0)
        for name in names:
            require_done(site.submit(key, parent, adapter=name, steps=1_000_000, seconds=3600))
        await asyncio.sleep(SETTLE_S)

        async def jobs() -> list[CoTrainerStatus]:
            return [await trainer.status(job=f"{name}/{key}") for name in names]

        before, began = await jobs(), time.perf_counter()
        for number in range(self._load.pairs):
            block = self._load.block(number)
            self.blocks["training"].append(await self._users["umbel"].ask(block, number, self._load.pairs + number))
        seconds, after = time.perf_counter() - began, await jobs()
        self._weigh("training", "umbel")
        for name in names:
            require_done(site.operator.delete(f"/adapters/{name}/rounds/{key}"))
        return Trained.between(before, after, seconds)

    def _weigh(self, system: System, family: str) -> None:
        self.private_bytes[system] = scheduler_of(self._families[family]).memory_full_info().uss


if __name__ == "__main__":
    main()
