"""`Bar`: the claims that a benchmark run is held against, with the paper each comes from, and the measured value."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from serving.bench.metrics import Block, attainment, goodput, paired_ratio, quality_goodput, quantile, values
from serving.bench.plan import JOINT
from serving.bench.results import NONE, Results, interval

STEADY = ("0.3", "0.6", "0.8")
HARVESTED = (*STEADY, "square")
"""Conditions with spare time to train in; above the capacity there is none."""


@dataclass(frozen=True)
class Bar:
    """One claim: the `measured` value against the `wanted` one."""

    claim: str
    wanted: str
    measured: str
    met: bool | None
    """None if the run did not measure it."""


def table(results: Results) -> str:
    """Return all bars as a Markdown table."""
    verdict = {True: "met", False: "**missed**", None: "not measured"}
    lines = ["| claim | wanted | measured | |", "|---|---|---|---|"]
    lines += [f"| {b.claim} | {b.wanted} | {b.measured} | {verdict[b.met]} |" for b in bars(results)]
    return "\n".join(lines)


def bars(results: Results) -> Iterator[Bar]:
    """Yield all bars, in the order of docs/benchmarks.md."""
    yield from _attained(results)
    yield _overload(results)
    yield from _harvest(results)
    yield from _goodput(results)
    yield from _unpaced(results)
    yield from _preemption(results)
    yield from _stock(results)


def _attained(results: Results) -> Iterator[Bar]:
    for load in STEADY:
        ours, alone = results.of(load, "ours"), results.of(load, "inference")
        ratio = paired_ratio(ours, alone, lambda block: attainment([block], results.slo))
        pooled = results.attained(load, "ours") / max(results.attained(load, "inference"), 1e-9)
        measured = f"{pooled:.3f}; by rounds {_fine(ratio)}"
        yield _bar(f"SLO attainment at load {load}, relative to inference only", "≥ 0.99", measured, pooled >= 0.99,
                   bool(ours and alone))  # fmt: skip


def _overload(results: Results) -> Bar:
    ours = results.of("1.2", "ours")
    share, low, high = results.harvest("1.2", "ours")
    half = results.harvest("0.3", "ours")[0]
    return _bar("training at load 1.2 falls to its floor (0), relative to training alone", "≤ 0.05",
                f"{interval((share, low, high))}, {_plain(half)} at load 0.3", share <= 0.05, bool(ours))  # fmt: skip


def _harvest(results: Results) -> Iterator[Bar]:
    ratios: dict[str, float] = {}
    for condition in HARVESTED:
        ours, theirs = results.harvest(condition, "ours")[0], results.harvest(condition, "partition")[0]
        if not (math.isnan(ours) or math.isnan(theirs)):
            ratios[condition] = (ours if results.feasible(condition, "ours") else 0.0) / max(theirs, 1e-9)
    infeasible = [condition for condition in ratios if not results.feasible(condition, "partition")]
    each = ", ".join(f"{condition}: {ratio:.2f}" for condition, ratio in ratios.items())
    note = f"; the partition itself breaks the targets at {', '.join(infeasible)}, and is counted" if infeasible else ""
    mean = sum(ratios.values()) / len(ratios) if ratios else math.nan
    best = max(ratios.values(), default=math.nan)
    claim = "SLO-feasible harvest over that of the best static partition, on average (Harli)"
    yield _bar(claim, "≥ 1.46", f"{mean:.2f} ({each}{note})", mean >= 1.46, bool(ratios))
    yield _bar("the same, at best", "≥ 1.92", f"{best:.2f}", best >= 1.92, bool(ratios))


def _goodput(results: Results) -> Iterator[Bar]:
    slo, quality = results.slo, results.quality
    ratios: dict[str, tuple[float, str]] = {}
    for condition in HARVESTED if quality else ():
        means = {
            system: _mean(results.of(condition, system), lambda block: quality_goodput(block, slo, quality))
            for system in (*JOINT, "ours")
            if results.of(condition, system)
        }
        ours = means.pop("ours", math.nan)
        if means and not math.isnan(ours):
            strongest = max(means, key=lambda system: means[system])
            ratios[condition] = (ours / max(means[strongest], 1e-9), strongest)
    each = ", ".join(f"{condition}: {ratio:.2f} ({strongest})" for condition, (ratio, strongest) in ratios.items())
    least = min((ratio for ratio, _ in ratios.values()), default=math.nan)
    claim = "quality goodput G_q over that of the best tuned joint baseline, in each condition (CoLLM)"
    yield _bar(claim, "≥ 1.4", each or NONE, least >= 1.4, bool(ratios))
    kept = {
        condition: paired_ratio(
            results.of(condition, "ours"), results.of(condition, "inference"), lambda block: goodput(block, slo)
        )
        for condition in results.conditions
        if results.of(condition, "ours") and results.of(condition, "inference") and condition != "1.2"
    }
    each = ", ".join(f"{condition}: {_fine(ratio)}" for condition, ratio in kept.items())
    worst = min((ratio[0] for ratio in kept.values()), default=math.nan)
    yield _bar(
        "requests within targets per second, relative to inference only", "≥ 0.97", each, worst >= 0.97, bool(kept)
    )


def _unpaced(results: Results) -> Iterator[Bar]:
    ours, theirs = results.of("0.6", "ours"), results.of("0.6", "unpaced_equal")
    tokens = paired_ratio(theirs, ours, lambda block: block.training_rate)
    bounds: tuple[tuple[Literal["ttft", "tpot"], float], ...] = (("ttft", 0.63), ("tpot", 0.30))
    for name, wanted in bounds:
        ratio = _ratio_of_p95(ours, theirs, name)
        measured = f"−{1 - ratio:.0%}" if ratio <= 1 else f"+{ratio - 1:.0%}"
        claim = f"P95 {name.upper()} against unpaced colocation at equal training tokens, load 0.6 (MACE)"
        measured = f"{measured}; its tokens were {interval(tokens)} of ours"
        yield _bar(claim, f"−{wanted:.0%}", measured, ratio <= 1 - wanted, bool(ours and theirs))


def _ratio_of_p95(ours: list[Block], theirs: list[Block], name: Literal["ttft", "tpot"]) -> float:
    return quantile(values(ours, name), 0.95) / max(quantile(values(theirs, name), 0.95), 1e-9)


def _preemption(results: Results) -> Iterator[Bar]:
    ours = [b for c in results.conditions for b in results.of(c, "ours") if b.preemption and b.preemption.arrivals]
    worst = max((b.preemption.p99_s for b in ours if b.preemption), default=math.nan)
    quantum = max((b.longest_quantum_s for b in ours), default=math.nan)
    counts = [b.preemption.count / b.preemption.arrivals for b in ours if b.preemption]
    yield _bar("preemption latency P99, at most one P99 quantum", f"≤ {quantum * 1e3:.1f} ms", f"{worst * 1e3:.1f} ms",
               worst <= quantum, bool(ours))  # fmt: skip
    most = max(counts, default=math.nan)
    yield _bar("preemptions per arriving request", "≤ 1", f"{most:.2f} in the worst block", most <= 1, bool(ours))


def _stock(results: Results) -> Iterator[Bar]:
    ours, stock = results.of("alone", "umbel_off", "stock"), results.of("alone", "stock", "stock")
    medians: tuple[tuple[str, Callable[[Block], float]], ...] = (
        ("TTFT", lambda block: quantile(values([block], "ttft"), 0.5)),
        ("TPOT", lambda block: quantile(values([block], "tpot"), 0.5)),
    )
    for name, median in medians:
        ratio = paired_ratio(ours, stock, median)
        claim = f"median {name} with training off, relative to stock SGLang"
        yield _bar(claim, "0.98–1.02", _fine(ratio), ratio[0] <= 1.02, bool(ours and stock))


def _bar(claim: str, wanted: str, measured: str, met: bool, known: bool) -> Bar:
    return Bar(claim, wanted, measured, met) if known else Bar(claim, wanted, NONE, None)


def _mean(blocks: list[Block], of: Callable[[Block], float]) -> float:
    return sum(map(of, blocks)) / len(blocks) if blocks else math.nan


def _fine(ratio: tuple[float, float, float]) -> str:
    middle, low, high = ratio
    return NONE if math.isnan(middle) else f"{middle:.3f} ({low:.3f}–{high:.3f})"


def _plain(value: float) -> str:
    return NONE if math.isnan(value) else f"{value:.2f}"
