"""`Row`: the figures of `scripts/bench_adapters` for one number of adapters, and `show`, the tables of them. Pure.

Systems: `stock` is SGLang without umbel, `umbel` a site that trains nothing, `training` one that trains all adapters.
"""

from collections.abc import Sequence
from typing import Literal, Self

import numpy as np
from pydantic import BaseModel

from serving.bench.intervals import Interval, paired, resampled
from serving.bench.load import Outcome
from serving.trainer_socket import CoTrainerStatus

System = Literal["stock", "umbel", "training"]
SYSTEMS: tuple[System, ...] = ("stock", "umbel", "training")
Latency = Literal["ttft", "tpot"]
COLUMNS: tuple[tuple[Latency, float], ...] = (("ttft", 0.5), ("ttft", 0.95), ("tpot", 0.5), ("tpot", 0.95))
ALLOWED = 1.02
"""Largest ratio of latencies, umbel's without training over stock SGLang's, that is promised."""
MB, KB = 1e6, 1e3


class Block(BaseModel):
    """Latencies in seconds of the requests of one block, in the order in which they were due."""

    ttft: list[float]
    tpot: list[float]

    @classmethod
    def of(cls, outcomes: Sequence[Outcome]) -> Self:
        """Take the latencies of all requests but those that were due at once, which wake the engine up."""
        counted = [outcome for outcome in outcomes if outcome.arrival.at > 0]
        return cls(ttft=[outcome.ttft for outcome in counted], tpot=[outcome.tpot for outcome in counted])


class Trained(BaseModel):
    """Training of all adapters together, in the time in which users asked."""

    seconds: float
    steps: int
    loss_tokens: int
    turns: int
    quanta_s: float
    """Seconds of all quanta, those of swaps included."""
    swap_s: float
    parked_bytes: int | None
    """Memory of one job that waits for its turn; None where no job ever waits."""

    @classmethod
    def between(cls, before: Sequence[CoTrainerStatus], after: Sequence[CoTrainerStatus], seconds: float) -> Self:
        """Subtract the statuses of all jobs, at the begin of so many seconds, from those at their end."""
        old, new = before[-1], after[-1]  # all have the same figures of the engine
        spent = {
            kind: stats.seconds - (old.quanta[kind].seconds if kind in old.quanta else 0.0)
            for kind, stats in new.quanta.items()
        }
        begun = sum(had_s > 0 for had_s in new.open_jobs.values())
        return cls(
            seconds=seconds,
            steps=sum(job.steps for job in after) - sum(job.steps for job in before),
            loss_tokens=sum(job.loss_tokens for job in after) - sum(job.loss_tokens for job in before),
            turns=new.turns - old.turns,
            quanta_s=sum(spent.values()),
            swap_s=spent.get("swap", 0.0),
            parked_bytes=new.parked_bytes // (begun - 1) if begun > 1 else None,
        )

    @property
    def tokens_per_s(self) -> float:
        return self.loss_tokens / self.seconds


class Row(BaseModel):
    """All figures for one number of adapters."""

    adapters: int
    slots: int
    """Adapters that the engine has room for on the device, the base and shadows included."""
    slot_bytes: int
    blocks: dict[System, list[Block]]
    """Block k has the same requests in every system."""
    trained: Trained
    private_bytes: dict[System, int]
    """Private memory of SGLang's scheduler process."""
    idle: dict[System, float]
    """Part of a core that all processes of a system have computed while the other one answered."""

    def latencies(self, system: System, name: Latency) -> list[list[float]]:
        """Return the latencies of one kind in seconds, block by block."""
        return [getattr(block, name) for block in self.blocks[system]]

    def ms(self, system: System, name: Latency, q: float) -> float:
        """Return a quantile in milliseconds."""
        return 1e3 * float(np.quantile(np.concatenate(self.latencies(system, name)), q))

    def over_stock(self, system: System, name: Latency, q: float) -> Interval:
        """Return a quantile over that of stock SGLang."""
        return resampled(self.latencies(system, name), self.latencies("stock", name), q)

    def pairs(self, name: Latency, q: float) -> list[tuple[float, float]]:
        """Return a quantile of each block, of umbel without training and of stock SGLang, in seconds."""
        umbel, stock = (self.latencies(system, name) for system in ("umbel", "stock"))
        return [
            (float(np.quantile(ours, q)), float(np.quantile(theirs, q)))
            for ours, theirs in zip(umbel, stock, strict=True)
        ]


def show(rows: Sequence[Row]) -> str:
    """Return the tables and the verdicts as Markdown."""
    parts = [latency_table(rows), training_table(rows), memory_table(rows)]
    return "\n\n".join("\n".join(part) for part in (*parts, verdicts(rows)))


def latency_table(rows: Sequence[Row]) -> list[str]:
    """Return the lines of the table of users' latencies."""
    titles = [f"{name.upper()} P{100 * q:.0f}" for name, q in COLUMNS]
    lines = _head("adapters", "system", "requests", *(f"{title}, ms, over stock's" for title in titles))
    for row in rows:
        for system in SYSTEMS:
            count = sum(len(block.ttft) for block in row.blocks[system])
            cells = [
                f"{row.ms(system, name, q):.1f}"
                + ("" if system == "stock" else f", {row.over_stock(system, name, q).text()}")
                for name, q in COLUMNS
            ]
            lines.append(_line(row.adapters, system, count, *cells))
    return lines


def training_table(rows: Sequence[Row]) -> list[str]:
    """Return the lines of the table of training beside users."""
    lines = _head(
        "adapters",
        "seconds",
        "steps",
        "loss tokens/s in sum",
        "over the first row's",
        "turns",
        "swaps' part of the quanta",
    )
    first = rows[0].trained.tokens_per_s
    for row in rows:
        done = row.trained
        rate = f"{done.tokens_per_s / first:.2f}" if first else "–"
        part = f"{done.swap_s / done.quanta_s:.2%}" if done.quanta_s else "–"
        lines.append(
            _line(row.adapters, f"{done.seconds:.0f}", done.steps, f"{done.tokens_per_s:.0f}", rate, done.turns, part)
        )
    return lines


def memory_table(rows: Sequence[Row]) -> list[str]:
    """Return the lines of the table of memory."""
    private = [f"{system}: scheduler, private MB" for system in SYSTEMS]
    lines = _head("adapters", "slots", "a slot, KB", "a parked job, KB", *private)
    for row in rows:
        parked = "–" if row.trained.parked_bytes is None else f"{row.trained.parked_bytes / KB:.0f}"
        mega = [f"{row.private_bytes[system] / MB:.0f}" for system in SYSTEMS]
        lines.append(_line(row.adapters, row.slots, f"{row.slot_bytes / KB:.0f}", parked, *mega))
    return lines


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Say for each latency whether umbel without training keeps what is promised, by the mean of all pairs' ratios."""
    lines = []
    for name, q in COLUMNS:
        pairs = [pair for row in rows for pair in row.pairs(name, q)]
        mean = paired(pairs)
        verdict = mean.outcome(most=ALLOWED)
        over = f"{name.upper()} P{100 * q:.0f}, umbel over stock, mean of {len(pairs)} pairs of blocks"
        lines.append(f"{over}: {mean.text(3)}; at most {ALLOWED}: {verdict}")
    idle = ", ".join(f"{system} {max(row.idle[system] for row in rows):.1%}" for system in SYSTEMS[:2])
    return [*lines, f"computed by an idle system while the other one answered, at most, of a core: {idle}"]


def _head(*titles: str) -> list[str]:
    return [_line(*titles), f"|{'---|' * len(titles)}"]


def _line(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"
