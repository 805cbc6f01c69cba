"""`umbel bench coexec`: one engine, every system, block after block; one JSON line per finished block.

A block that has finished is not run again: with `--resume` the run goes on where it stopped.
"""

import asyncio
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from serving.bench import domain, testbed
from serving.bench.load import Client, Outcome
from serving.bench.metrics import Block, Request, Setting, attainment, read_blocks
from serving.bench.plan import FULL, SAME_SETTING, SMOKE, STOCK_S, SYSTEMS, Plan, Spec, strict, tuned, workload
from serving.bench.rounds import FOREVER, TOKENS_PER_STEP, Rounds, publications
from serving.bench.systems import UseSystem
from serving.bench.trace import NO_TRACE, Arrival, Trace
from serving.cotrainer.slo import Slo
from serving.trainer_socket import CoTrainerClient, EvaluateJob
from umbel import peft_dir
from umbel.errors import ConfigError, TrainingError

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
        trace = self.trace
        self.say("searching for the capacity")
        await self._inference("capacity", trace.replay(5.0, 4.0, 0.0), 4.0)  # the first requests are slow
        full = await self._inference("capacity", trace.replay(*SATURATION, 0.0), SATURATION[1])
        saturation = len(full.requests) / max(r.at + (r.ttft or 0) + (r.tpot or 0) * r.tokens for r in full.requests)
        slo = strict(await self._inference("capacity", trace.replay(0.4 * saturation, 8.0, 0.0), 8.0))
        low, high = (part * saturation for part in SEARCHED)
        for _ in range(self.plan.bisections):
            rate = (low + high) / 2
            low, high = (rate, high) if await self._kept_up(rate, slo) else (low, rate)
        capacity = low if self.plan.bisections else SMOKE_CAPACITY * saturation
        block = await self._inference("preset", trace.replay(0.6 * capacity, 12.0, 0.02), 12.0)
        slo = strict(block)
        setting = Setting(saturation, capacity, slo.ttft_s, slo.tpot_s, attainment([block], slo))
        file.write_text(json.dumps(asdict(setting), indent=2))
        self.say(
            f"saturated at {saturation:.1f} requests/s, capacity {capacity:.1f}; targets: "
            f"TTFT {slo.ttft_s * 1e3:.0f} ms, TPOT {slo.tpot_s * 1e3:.1f} ms"
        )
        return setting

    async def _kept_up(self, rate: float, slo: Slo) -> bool:
        """Return whether inference only keeps its targets; a failure is tried once more, as it may be a hiccup."""
        for start in (0.0, 0.01):
            block = await self._inference("capacity", self.trace.replay(rate, 10.0, start), 10.0)
            if attainment([block], slo) >= CAPACITY_TARGET:
                return True
        return False

    async def _inference(self, phase: Any, arrivals: tuple[Arrival, ...], window: float) -> Block:
        await self.bed.trainer.use(UseSystem(policy="rest"))
        began = time.perf_counter()
        with testbed.core_use() as cores:
            outcomes = await self.bed.client.run(arrivals, next(self.seeds), DRAIN_S, began)
        block = Block(
            phase=phase, condition="", system="inference", round=next(self.seeds), window=window,
            offered=len(arrivals) / window, requests=_requests(outcomes, {}),
            cores=(cores[testbed.ENGINE_CORE], cores[testbed.CLIENT_CORE]),
        )  # fmt: skip
        self._keep(block)
        return block

    async def _block(self, spec: Spec, setting: Setting) -> Block:
        if spec.phase == "stock":
            return await self._compare_with_stock(spec)
        system, options = SYSTEMS[spec.system], self._options(spec, setting)
        window = self.plan.window if spec.phase == "measure" else self.plan.tuning_window
        separate = system.place == "separate"
        fields = {name: value for name, value in options.items() if name != "nice"}
        use = UseSystem(
            policy=system.policy, ttft_s=setting.ttft_s, tpot_s=setting.tpot_s, disturbed=separate,
            **{name: int(value) if name in ("steps", "micro_batch") else value for name, value in fields.items()},
        )  # fmt: skip
        await self.bed.trainer.use(use)
        self.bed.set_nice(int(options.get("nice", 0)))
        trainer: CoTrainerClient = self.bed.separate if separate else self.bed.trainer
        rounds = Rounds(
            trainer, self.bed.engine.client, self.bed.engine.config.site.state_dir, self.bed.world,
            self.out / "adapters", self.versions,
        )  # fmt: skip
        await asyncio.sleep(SETTLE_S)
        arrivals = workload(self.trace, spec, setting.capacity, setting.saturation, window)
        most_steps = 0.0 if system.place == "nowhere" else self._most_steps(spec)
        return await self._measured(spec, options, arrivals, window, rounds, most_steps)

    async def _measured(
        self, spec: Spec, options: dict[str, float], arrivals: tuple[Arrival, ...], window: float, rounds: Rounds,
        most_steps: float,
    ) -> Block:  # fmt: skip
        began, cpu = time.perf_counter(), sum(self.bed.separate_process.cpu_times()[:2])
        load = asyncio.create_task(self.bed.client.run(arrivals, next(self.seeds), DRAIN_S, began))
        training = asyncio.create_task(rounds.run(most_steps))
        with testbed.core_use() as cores:
            await asyncio.sleep(began + window - time.perf_counter())
        cpu = sum(self.bed.separate_process.cpu_times()[:2]) - cpu
        training.cancel()
        (ended,) = await asyncio.gather(training, return_exceptions=True)
        if isinstance(ended, Exception):
            raise ended
        await rounds.end_window()
        outcomes = await load
        if spec.system == "training" and not rounds.steps:
            raise TrainingError(
                f"nothing was trained in {window:g} s without any user; see {self.out}/site/state/engine.log"
            )
        status = await self.bed.trainer.status()
        await rounds.clear()
        shutil.rmtree(self.bed.engine.config.site.state_dir / "versions", ignore_errors=True)
        digests = {str(version.ref): version.digest for version in rounds.published}
        firsts = {o.version: min(p.first for p in outcomes if p.version == o.version) for o in outcomes if o.ok}
        return Block(
            phase=spec.phase, condition=spec.condition, system=spec.system, round=spec.round, window=window,
            options=options, offered=len(arrivals) / window, requests=_requests(outcomes, digests),
            steps=rounds.steps, tokens=rounds.steps * TOKENS_PER_STEP,
            versions=publications(rounds.published, began, firsts),
            progress=tuple((round(at - began, 3), steps) for at, steps in rounds.progress),
            preemption=status.preemption if SYSTEMS[spec.system].policy.startswith("slo") else None,
            longest_quantum_s=status.longest_quantum_s,
            cores=(cores[testbed.ENGINE_CORE], cores[testbed.CLIENT_CORE]),
            trainer_share=cpu / window,
        )  # fmt: skip

    def _options(self, spec: Spec, setting: Setting) -> dict[str, float]:
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
        client = Client(url, "base", self.bed.symbols, key=stock.key if is_stock else None)
        try:
            (stock.go_on if is_stock else stock.pause)()
            (engine.pause if is_stock else engine.go_on)()
            await asyncio.sleep(SETTLE_S)
            end = time.perf_counter() + STOCK_S
            with testbed.core_use() as cores:
                while (now := time.perf_counter()) < end:
                    outcomes += await client.run((ALONE,), next(self.seeds), DRAIN_S, now)
        finally:
            engine.go_on()
            stock.pause()
            await client.close()
        return Block(
            phase="stock", condition=spec.condition, system=spec.system, round=spec.round, window=STOCK_S,
            offered=len(outcomes) / STOCK_S, requests=_requests(outcomes, {}),
            cores=(cores[testbed.ENGINE_CORE], cores[testbed.CLIENT_CORE]),
        )  # fmt: skip

    def _keep(self, block: Block) -> None:
        """Append a block to `blocks.jsonl`, durably."""
        self.blocks.append(block)
        with (self.out / "blocks.jsonl").open("a") as file:
            file.write(block.model_dump_json() + "\n")
            file.flush()
            os.fsync(file.fileno())

    async def evaluate(self) -> None:
        """Have the separate trainer compute the held-out loss of every version that was served, after all blocks.

        Raises TrainingError if one cannot be evaluated.
        """
        file = self.out / "quality.json"
        losses: dict[str, float] = json.loads(file.read_text()) if file.is_file() else {}
        self.bed.set_nice(0)
        wanted = {request.version for block in self.blocks for request in block.requests}
        for digest in sorted(wanted - losses.keys() | ({""} - losses.keys())):
            weights = self.out / "adapters" / f"{digest}.safetensors" if digest else self._initial()
            await self.bed.separate.start(
                EvaluateJob(id=f"evaluate-{digest}", adapter=str(weights), data=str(self.bed.world.heldout))
            )
            while not (status := await self.bed.separate.status()).state.final:
                await asyncio.sleep(0.02)
            if status.evaluation is None:
                raise TrainingError(f"{weights}: evaluating it failed: {status.error}")
            losses[digest] = status.evaluation.loss
        file.write_text(json.dumps(losses, indent=2))

    def _initial(self) -> Path:
        return self.bed.world.initial / peft_dir.WEIGHTS


def _requests(outcomes: list[Outcome], digests: dict[str, str]) -> tuple[Request, ...]:
    return tuple(Request.of(outcome, digests) for outcome in outcomes)


def _line(block: Block, slo: Slo) -> str:
    void = ", void: the client's core was too busy" if block.void else ""
    return (
        f"{block.phase} {block.condition} {block.system} {block.round} {block.options or ''}: "
        f"{len(block.requests)} requests, attained {attainment([block], slo):.3f}, {block.training_rate:.0f} tokens/s "
        f"trained, {len(block.versions)} versions; cores {block.cores[0]:.0%} {block.cores[1]:.0%}{void}"
    )


def run(
    out: Path, trace_file: Path | None, *, smoke: bool, resume: bool, cache: Path, say: Callable[[str], None]
) -> None:
    """Run the whole protocol into the folder `out`. Raises ConfigError before anything is started if it cannot run."""
    plan = SMOKE if smoke else FULL
    testbed.require_machine(with_priorities="partition" in plan.tuned)
    trace = Trace.read(trace_file)
    if (out / "blocks.jsonl").exists() and not resume:
        raise ConfigError(f"{out} holds a run; go on with --resume, or name another folder with --out")
    (out / "adapters").mkdir(parents=True, exist_ok=True)
    if trace_file is None:
        say(NO_TRACE)
    world = domain.build(cache, domain.Recipe(), say)
    facts = {"smoke": smoke, "trace": trace_file.name if trace_file else None, "machine": testbed.describe()}
    (out / "run.json").write_text(json.dumps(facts, indent=2))
    say(f"starting the engine; at most about {plan.seconds() / 60:.0f} minutes in all")
    asyncio.run(_run(out, plan, trace, world, say))


async def _run(out: Path, plan: Plan, trace: Trace, world: domain.World, say: Callable[[str], None]) -> None:
    blocks = read_blocks(out)
    bed = await testbed.start(out / "site", world, domain.Recipe().symbols, with_stock=plan.stock_pairs > 0)
    try:
        this = Run(out, plan, trace, bed, say, blocks, itertools.count(len(blocks) * 10_000))
        await this.protocol()
        await this.evaluate()
    finally:
        await testbed.stop(bed)
