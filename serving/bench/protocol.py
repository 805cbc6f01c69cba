"""`Run`: the blocks of a benchmark run, one after the other, each kept as soon as it has finished."""

import asyncio
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from serving.bench.load import Client, Outcome, sleep_until
from serving.bench.metrics import Block, Request, Setting, Spent, attainment
from serving.bench.plan import (
    SAME_SETTING,
    STOCK_S,
    SYSTEMS,
    USUAL_SHARE,
    Options,
    Plan,
    Spec,
    strict,
    tuned,
    workload,
)
from serving.bench.processes import testbed
from serving.bench.processes.core_use import Use
from serving.bench.processes.duty import DutyCycle
from serving.bench.rounds import BATCH, FOREVER, Rounds, heldout_losses, publications
from serving.bench.systems import UseSystem
from serving.bench.trace import AS_TRACED, Arrival, ArrivalProcess, Trace
from serving.cotrainer.slo import Slo
from serving.trainer_socket import CoTrainerClient
from umbel.errors import TrainingError

DRAIN_S = 30.0
"""Wait for open answers after the last request of a block."""
ALONE = Arrival(0.0, prompt=64, output=16)
"""The request that is sent, one at a time, to compare with stock SGLang."""
SETTLE_S = 0.2
"""Pause after a switch of systems."""
SATURATION = (40.0, 5.0)
"""Requests per second, and seconds of them: far more than any tiny model on a core answers."""
CAPACITY_TARGET = 0.99
"""Share of requests within the targets up to which a rate counts as kept."""
SEARCHED = (0.15, 0.75)
"""Bounds of the search for the capacity, as parts of the saturated rate."""
SMOKE_CAPACITY = 0.6
"""Capacity of a smoke run as a part of the saturated rate; such a run does not search."""


@dataclass
class Run:
    """A run of the protocol: its folder, its engine, and the blocks that have finished."""

    out: Path
    plan: Plan
    trace: Trace
    bed: testbed.Testbed
    say: Callable[[str], None]
    blocks: list[Block] = field(default_factory=list)
    seeds: Iterator[int] = field(default_factory=itertools.count)
    versions: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    """Seeds and version numbers are never used twice: so no cache knows a prompt, and no engine a version's name."""
    process: ArrivalProcess = AS_TRACED

    async def protocol(self) -> None:
        """Measure the setting, then run every block that has not been run."""
        setting = await self._setting()
        done = {block.key for block in self.blocks}
        specs = [spec for spec in self.plan.specs(setting.capacity) if spec.key not in done]
        for number, spec in enumerate(specs, 1):
            block = await self._block(spec, setting)
            self._keep(block)
            self.say(f"{number} of {len(specs)}: {_line(block, setting.slo)}")

    async def _setting(self) -> Setting:
        """Measure saturation, targets and capacity with inference only; read them if the run has done so before."""
        file = self.out / "setting.json"
        if file.is_file():
            return Setting(**json.loads(file.read_text()))
        self.say("searching for the capacity")
        await self._inference("capacity", self._arrivals(5.0, 4.0, 0.0), 4.0)  # the first requests are slow
        full = await self._inference("capacity", self._arrivals(*SATURATION, 0.0), SATURATION[1])
        saturation = len(full.requests) / max(r.at + (r.ttft or 0) + (r.tpot or 0) * r.tokens for r in full.requests)
        slo = self._targets(await self._inference("capacity", self._arrivals(0.4 * saturation, 8.0, 0.0), 8.0))
        low, high = (part * saturation for part in SEARCHED)
        for _ in range(self.plan.bisections):
            rate = (low + high) / 2
            low, high = (rate, high) if await self._kept_up(rate, slo) else (low, rate)
        capacity = low if self.plan.bisections else SMOKE_CAPACITY * saturation
        block = await self._inference("preset", self._arrivals(0.6 * capacity, 12.0, 0.02), 12.0)
        slo = self._targets(block)
        setting = Setting(saturation, capacity, slo.ttft_s, slo.tpot_s, attainment([block], slo))
        file.write_text(json.dumps(asdict(setting), indent=2))
        self.say(
            f"saturated at {saturation:.1f} requests/s, capacity {capacity:.1f}; targets: "
            f"TTFT {slo.ttft_s * 1e3:.0f} ms, TPOT {slo.tpot_s * 1e3:.1f} ms"
        )
        return setting

    def _arrivals(self, rate: float, seconds: float, start: float) -> tuple[Arrival, ...]:
        return self.trace.replay(rate, seconds, start, self.process)

    def _targets(self, block: Block) -> Slo:
        """Return the site's own targets; without any, strict ones, from a block of inference only."""
        return self.bed.world.slo or strict(block)

    async def _kept_up(self, rate: float, slo: Slo) -> bool:
        """Return whether inference only keeps its targets; a failure is tried once more, as it may be a hiccup."""
        for start in (0.0, 0.01):
            block = await self._inference("capacity", self._arrivals(rate, 10.0, start), 10.0)
            if attainment([block], slo) >= CAPACITY_TARGET:
                return True
        return False

    async def _inference(self, phase: Any, arrivals: tuple[Arrival, ...], window: float) -> Block:
        await self.bed.trainer.use(UseSystem(policy="rest"))
        began = time.perf_counter()
        with self.bed.use() as use:
            outcomes = await self.bed.client.run(arrivals, next(self.seeds), DRAIN_S, began)
        block = Block(
            phase=phase, condition="", system="inference", round=next(self.seeds), window=window,
            offered=len(arrivals) / window, requests=_requests(outcomes, {}),
            cores=_cores(use),
        )  # fmt: skip
        self._keep(block)
        return block

    async def _block(self, spec: Spec, setting: Setting) -> Block:
        if spec.phase == "stock":
            return await self._compare_with_stock(spec)
        system, options = SYSTEMS[spec.system], self._options(spec, setting)
        window = self.plan.window if spec.phase == "measure" else self.plan.tuning_window
        separate = system.place == "separate"
        fields = {"micro_batch": self.bed.world.micro_batch} | {
            name: int(value) if name in ("steps", "micro_batch") else value
            for name, value in options.items()
            if name not in ("nice", "share")
        }
        use = UseSystem(
            policy=system.policy, ttft_s=setting.ttft_s, tpot_s=setting.tpot_s, disturbed=separate, **fields
        )  # fmt: skip
        await self.bed.trainer.use(use)
        self.bed.set_nice(int(options.get("nice", 0)))
        trainer: CoTrainerClient = self.bed.separate if separate else self.bed.trainer
        rounds = Rounds(
            trainer, self.bed.engine.client, self.bed.engine.config.site.state_dir, self.bed.world,
            self.out / "adapters", self.versions,
        )  # fmt: skip
        await asyncio.sleep(SETTLE_S)
        arrivals = workload(self.trace, spec, setting.capacity, setting.saturation, window, self.process)
        most_steps = 0.0 if system.place == "nowhere" else self._most_steps(spec)
        with self._partition(spec.system, options):
            return await self._measured(spec, options, arrivals, window, rounds, most_steps)

    def _partition(self, system: str, options: Options) -> AbstractContextManager[None]:
        """Return the context in which the hard partition's processes have their turns; for others one of nothing."""
        if system != "hard":
            return nullcontext()
        server, trainer = self.bed.scheduler.pid, self.bed.separate_process.pid
        return DutyCycle(server, trainer, options.get("share", USUAL_SHARE))

    async def _measured(
        self, spec: Spec, options: Options, arrivals: tuple[Arrival, ...], window: float, rounds: Rounds,
        most_steps: float,
    ) -> Block:  # fmt: skip
        place = SYSTEMS[spec.system].place
        before = await self.bed.trainer.status()
        began = time.perf_counter()
        load = asyncio.create_task(self.bed.client.run(arrivals, next(self.seeds), DRAIN_S, began))
        training = asyncio.create_task(rounds.run(most_steps))
        with self.bed.use() as use:
            await sleep_until(began + window)
        after = await self.bed.trainer.status()
        training.cancel()
        (ended,) = await asyncio.gather(training, return_exceptions=True)
        if isinstance(ended, Exception):
            raise ended
        await rounds.end_window()
        outcomes = await load
        if spec.system == "training" and not rounds.steps:
            raise TrainingError(
                f"not one step of {BATCH} examples was trained in {window:g} s without any user; give more with "
                f"--window, or see {self.out}/site/state/engine.log"
            )
        status = await self.bed.trainer.status()
        await rounds.clear()
        shutil.rmtree(self.bed.engine.config.site.state_dir / "versions", ignore_errors=True)
        digests = {str(version.ref): version.digest for version in rounds.published}
        firsts = {o.version: min(p.first for p in outcomes if p.version == o.version) for o in outcomes if o.ok}
        return Block(
            phase=spec.phase, condition=spec.condition, system=spec.system, round=spec.round, window=window,
            options=options, offered=len(arrivals) / window, requests=_requests(outcomes, digests),
            steps=rounds.steps, tokens=round(rounds.steps * BATCH * self.bed.world.tokens_per_row),
            versions=publications(rounds.published, began, firsts),
            progress=tuple((round(at - began, 3), steps) for at, steps in rounds.progress),
            preemption=status.preemption if SYSTEMS[spec.system].policy.startswith("slo") else None,
            longest_quantum_s=status.longest_quantum_s,
            cores=_cores(use), engine_share=use.processes[0],
            trainer_share=use.processes[1] if place == "separate" else 0.0,
            spent=Spent.between(before, after) if place == "engine" else None,
        )  # fmt: skip

    def _options(self, spec: Spec, setting: Setting) -> Options:
        system = SAME_SETTING.get(spec.system, spec.system)
        if spec.phase == "tune":
            return SYSTEMS[system].grid[spec.round]
        return tuned(self.blocks, setting.slo, setting.attained).get(system, {})

    def _most_steps(self, spec: Spec) -> float:
        """Return the most steps of a block; for `unpaced_equal`, as many as umbel took in the same round."""
        if spec.system != "unpaced_equal":
            return FOREVER
        same = ("measure", spec.condition, "ours", spec.round)
        return next((float(block.steps) for block in self.blocks if block.key == same), 0.0)

    async def _compare_with_stock(self, spec: Spec) -> Block:
        """Measure the base with umbel's plugin or without, one request after the other; the other server is stopped.

        A request that is alone takes the same time whenever it comes, except for the time that the plugin adds.
        """
        stock = self.bed.stock
        assert stock is not None
        await self.bed.trainer.use(UseSystem(policy="rest"))
        outcomes: list[Outcome] = []
        is_stock = spec.system == "stock"
        engine = self.bed.engine
        url = stock.url if is_stock else engine.client.url
        client = Client(url, "base", self.bed.world.prompt_ids, key=stock.key if is_stock else None)
        try:
            (stock.go_on if is_stock else stock.pause)()
            (engine.pause if is_stock else engine.go_on)()
            await asyncio.sleep(SETTLE_S)
            end = time.perf_counter() + STOCK_S
            with self.bed.use() as use:
                while (now := time.perf_counter()) < end:
                    outcomes += await client.run((ALONE,), next(self.seeds), DRAIN_S, now)
        finally:
            engine.go_on()
            stock.pause()
            await client.close()
        return Block(
            phase="stock", condition=spec.condition, system=spec.system, round=spec.round, window=STOCK_S,
            offered=len(outcomes) / STOCK_S, requests=_requests(outcomes, {}),
            cores=_cores(use),
        )  # fmt: skip

    def _keep(self, block: Block) -> None:
        """Append a block to `blocks.jsonl`, durably."""
        self.blocks.append(block)
        with (self.out / "blocks.jsonl").open("a") as file:
            file.write(block.model_dump_json() + "\n")
            file.flush()
            os.fsync(file.fileno())

    async def evaluate(self) -> None:
        """Have the separate trainer compute the held-out loss of every version that was served, after all blocks."""
        file = self.out / "quality.json"
        losses: dict[str, float] = json.loads(file.read_text()) if file.is_file() else {}
        self.bed.set_nice(0)
        served = {request.version for block in self.blocks for request in block.requests} | {""}
        wanted = sorted(served - losses.keys())
        losses |= await heldout_losses(self.bed.separate, self.bed.world, self.out / "adapters", wanted)
        file.write_text(json.dumps(losses, indent=2))


def _cores(use: Use) -> tuple[float, float]:
    return use.cores[testbed.ENGINE_CORE], use.cores[testbed.CLIENT_CORE]


def _requests(outcomes: list[Outcome], digests: dict[str, str]) -> tuple[Request, ...]:
    return tuple(Request.of(outcome, digests) for outcome in outcomes)


def _line(block: Block, slo: Slo) -> str:
    void = ", void: the client's core was too busy" if block.void else ""
    return (
        f"{block.phase} {block.condition} {block.system} {block.round} {block.options or ''}: "
        f"{len(block.requests)} requests, attained {attainment([block], slo):.3f}, {block.training_rate:.0f} tokens/s "
        f"trained, {len(block.versions)} versions; cores {block.cores[0]:.0%} {block.cores[1]:.0%}{void}"
    )
