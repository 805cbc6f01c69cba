"""`run`: `umbel bench coexec`: one engine, every system, block after block; one JSON line per finished block.

A block that has finished is not run again: with `--resume` the run goes on where it stopped.
"""

import asyncio
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from serving.bench.metrics import read_blocks
from serving.bench.plan import FULL, SMOKE, Plan
from serving.bench.processes import testbed
from serving.bench.protocol import Run
from serving.bench.trace import AS_TRACED, NO_TRACE, ArrivalProcess, Trace
from serving.bench.world import World
from umbel.errors import ConfigError


@dataclass(frozen=True)
class Order:
    """A run that is asked for."""

    trace: Path | None = None
    """CSV of a trace; None: lengths fitted to one."""
    process: ArrivalProcess = AS_TRACED
    smoke: bool = False
    resume: bool = False
    window: float | None = None
    """Seconds of a block; None: those of the plan."""

    @property
    def plan(self) -> Plan:
        """Return the plan, with blocks of the wanted length."""
        plan = SMOKE if self.smoke else FULL
        return plan if self.window is None else replace(plan, window=self.window, tuning_window=self.window)


def run(out: Path, order: Order, world: Callable[[], World], say: Callable[[str], None]) -> None:
    """Run the whole protocol into the folder `out`, on the base and data that `world` makes.

    Raises ConfigError before anything is started or made if it cannot run.
    """
    plan = order.plan if not _has_accelerator() else order.plan.in_engine()
    testbed.require_machine(with_priorities="partition" in plan.tuned)
    trace = Trace.read(order.trace)
    if (out / "blocks.jsonl").exists() and not order.resume:
        raise ConfigError(f"{out} holds a run; go on with --resume, or name another folder with --out")
    (out / "adapters").mkdir(parents=True, exist_ok=True)
    if order.trace is None:
        say(NO_TRACE)
    made = world()
    plan = replace(plan, stock_pairs=0) if made.site else plan  # one engine less in memory; it is the same there
    facts = {
        "smoke": order.smoke, "trace": order.trace.name if order.trace else None, "load": order.process.name,
        "site": made.site or None, "machine": testbed.describe(),
    }  # fmt: skip
    _require_same(out / "run.json", facts)
    say(f"starting the engine; at most about {plan.seconds() / 60:.0f} minutes in all")
    asyncio.run(_run(out, plan, trace, made, order.process, say))


def _has_accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()


def _require_same(file: Path, facts: dict[str, Any]) -> None:
    """Write the facts of a run; raise ConfigError if it was begun with other ones that its figures depend on."""
    if file.is_file():
        before = json.loads(file.read_text())
        other = [name for name in ("smoke", "trace", "load", "site") if before.get(name) != facts[name]]
        if other:
            raise ConfigError(
                f"{file.parent} was begun with another {' and '.join(other)}; go on with the same, or name another "
                "folder with --out"
            )
    file.write_text(json.dumps(facts, indent=2))


async def _run(
    out: Path, plan: Plan, trace: Trace, world: World, process: ArrivalProcess, say: Callable[[str], None]
) -> None:
    blocks = read_blocks(out)
    bed = await testbed.start(out / "site", world, with_stock=plan.stock_pairs > 0)
    try:
        this = Run(out, plan, trace, bed, say, blocks, itertools.count(len(blocks) * 10_000), process=process)
        await this.protocol()
        await this.evaluate()
    finally:
        await testbed.stop(bed)
