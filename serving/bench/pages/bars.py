"""`Bar`: the claims that a benchmark run is held against, with the paper each comes from, and the measured value.

A claim is met, or missed, only if its whole interval says so. One about several conditions takes intervals that hold
together (Bonferroni).
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from serving.bench.intervals import (
    CONFIDENCE,
    NONE,
    Interval,
    Outcome,
    agreed,
    binomial,
    enough,
    mean_ratio,
)
from serving.bench.metrics import (
    Block,
    attainment,
    goodput,
    paired_ratio,
    pairs,
    quality_goodput,
    quantile,
    values,
)
from serving.bench.plan import JOINT, STEADY
from serving.bench.results import Results

HARVESTED = (*STEADY, "square")
"""Conditions with spare time to train in; above the capacity there is none."""
ATTAINED = 0.99
"""Wanted part of the attainment of inference only."""


@dataclass(frozen=True)
class Bar:
    """One claim: the `measured` value against the `wanted` one."""

    claim: str
    wanted: str
    measured: str
    outcome: Outcome


def table(results: Results) -> str:
    """Return all bars as a Markdown table."""
    words = {outcome: outcome.value for outcome in Outcome} | {Outcome.MISSED: "**missed**"}
    lines = ["| claim | wanted | measured (95 %) | |", "|---|---|---|---|"]
    lines += [f"| {b.claim} | {b.wanted} | {b.measured} | {words[b.outcome]} |" for b in bars(results)]
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
    """Yield the attainment at each load: by requests and by rounds, as those of one round share its hiccups."""
    for load in STEADY:
        ours, alone = results.of(load, "ours"), results.of(load, "inference")
        rounds = paired_ratio(ours, alone, lambda block: attainment([block], results.slo))
        exact, requests = results.kept(load, "ours"), sum(len(block.requests) for block in ours)
        few = f"; it takes {enough(ATTAINED)} to tell" if requests < enough(ATTAINED) else ""
        measured = f"{exact.text(3)} by {requests} requests{few}; {rounds.text(3)} by {len(ours)} rounds"
        outcome = agreed(found.outcome(least=ATTAINED) for found in (exact, rounds))
        claim = f"SLO attainment at load {load}, relative to inference only"
        yield _bar(claim, f"≥ {ATTAINED}", measured, outcome, bool(ours and alone))


def _overload(results: Results) -> Bar:
    ours, alone = results.of("1.2", "ours"), results.of("none", "training")
    step = max((block.tokens / block.steps for block in alone if block.steps), default=0.0)
    most = paired_ratio(
        ours, alone, lambda b: b.training_rate + (b.system == "ours") * step / b.window
    )  # a step that the end cut off is not in the tokens
    measured = (
        f"{results.harvest('1.2', 'ours').text()}; with the unfinished step of each round {most.text()}; "
        f"{results.harvest('0.3', 'ours').text()} at load 0.3"
    )
    claim = "training at load 1.2 falls to its floor (0), relative to training alone"
    return _bar(claim, "≤ 0.05", measured, most.outcome(most=0.05), bool(ours and alone))


def _harvest(results: Results) -> Iterator[Bar]:
    """Yield umbel's harvest over that of the hard partition, which papers mean by a static one, and of the nice one."""
    hard, mean = _harvest_over(results, "hard")
    each = _each(results, hard, "hard")
    claim = "harvest over that of the best hard partition, geometric mean over the conditions (Harli)"
    yield _bar(claim, "≥ 1.46", f"{mean.text()} ({each})", mean.outcome(least=1.46), bool(hard))
    best = _extreme(hard, max)
    yield _bar("the same, at best", "≥ 1.92", best.text(), best.outcome(least=1.92), bool(hard))
    nice, mean = _harvest_over(results, "partition")
    each = _each(results, nice, "partition")
    claim = "harvest over that of the best nice partition, on one copy of the base, geometric mean over the conditions"
    yield _bar(claim, "≥ 0.97", f"{mean.text()} ({each})", mean.outcome(least=0.97), bool(nice))


def _harvest_over(results: Results, system: str) -> tuple[dict[str, Interval], Interval]:
    """Return the ratio of umbel's harvest to another system's in each condition, and their mean over the rounds."""

    def trained(block: Block) -> float:
        return block.training_rate

    found, by_round = {}, []
    for condition in HARVESTED:
        ours, theirs = results.of(condition, "ours"), results.of(condition, system)
        if pairs(ours, theirs, trained):
            found[condition] = paired_ratio(ours, theirs, trained, _together(HARVESTED))
            by_round.append(pairs(ours, theirs, trained))
    return found, _mean_over_conditions(by_round)


def _each(results: Results, found: Mapping[str, Interval], system: str) -> str:
    return ", ".join(
        f"{condition}: {ratio.text()} with {results.attained(condition, 'ours').value:.3f} attained against "
        f"{results.attained(condition, system).value:.3f}"
        for condition, ratio in found.items()
    )


def _mean_over_conditions(conditions: list[dict[int, tuple[float, float]]]) -> Interval:
    """Return the mean over rounds of each round's geometric mean ratio."""
    rounds = set.intersection(*map(set, conditions)) if conditions else set()
    ratios = []
    for number in sorted(rounds):
        both = [pairs[number] for pairs in conditions]
        if not all(ours > 0 and theirs > 0 for ours, theirs in both):
            return Interval(math.nan, math.nan, math.nan, f"nothing was trained in a block of round {number}")
        ratios.append(math.exp(sum(math.log(ours / theirs) for ours, theirs in both) / len(both)))
    return mean_ratio(ratios) if ratios else Interval(math.nan, math.nan, math.nan)


def _goodput(results: Results) -> Iterator[Bar]:
    slo, quality = results.slo, results.quality
    ratios: dict[str, Interval] = {}
    strongest: dict[str, str] = {}
    for condition in HARVESTED if quality else ():
        means = {
            system: _mean(results.of(condition, system), lambda block: quality_goodput(block, slo, quality))
            for system in JOINT
            if results.of(condition, system)
        }
        ours = results.of(condition, "ours")
        if means and ours:
            strongest[condition] = best = max(means, key=lambda system: means[system])
            ratios[condition] = paired_ratio(
                ours, results.of(condition, best), lambda b: quality_goodput(b, slo, quality), _together(HARVESTED)
            )
    each = ", ".join(f"{condition}: {ratio.text()} ({strongest[condition]})" for condition, ratio in ratios.items())
    claim = "quality goodput G_q over that of the best joint baseline measured there, in each condition (CoLLM)"
    yield _bar(claim, "≥ 1.4", each, _extreme(ratios, min).outcome(least=1.4), bool(ratios))
    kept = {
        condition: paired_ratio(
            results.of(condition, "ours"), results.of(condition, "inference"), lambda b: goodput(b, slo),
            _together(HARVESTED),
        )
        for condition in HARVESTED
        if results.of(condition, "ours") and results.of(condition, "inference")
    }  # fmt: skip
    each = ", ".join(f"{condition}: {ratio.text(3)}" for condition, ratio in kept.items())
    claim = "requests within targets per second, relative to inference only"
    yield _bar(claim, "≥ 0.97", each, _extreme(kept, min).outcome(least=0.97), bool(kept))


def _unpaced(results: Results) -> Iterator[Bar]:
    ours, theirs = results.of("0.6", "ours"), results.of("0.6", "unpaced_equal")
    tokens = paired_ratio(theirs, ours, lambda block: block.training_rate)
    bounds: tuple[tuple[Literal["ttft", "tpot"], float], ...] = (("ttft", 0.63), ("tpot", 0.30))
    for name, wanted in bounds:
        ratio = paired_ratio(ours, theirs, _p95_of(name))
        claim = f"P95 {name.upper()} over that of unpaced colocation that trains {tokens.text()} of our tokens (MACE)"
        outcome = ratio.outcome(most=1 - wanted)
        yield _bar(claim, f"≤ {1 - wanted:.2f}", ratio.text(), outcome, bool(ours and theirs))


def _p95_of(name: Literal["ttft", "tpot"]) -> Callable[[Block], float]:
    return lambda block: quantile(values([block], name), 0.95)


def _preemption(results: Results) -> Iterator[Bar]:
    ours = [b for c in results.conditions for b in results.of(c, "ours") if b.preemption and b.preemption.arrivals]
    quantum = max((b.longest_quantum_s for b in ours), default=math.nan)
    longest = max((b.preemption.longest_s for b in ours if b.preemption), default=math.nan)
    arrivals = sum(b.preemption.arrivals for b in ours if b.preemption)
    least, most = (sum(counts) for counts in zip(*[_longer(b, quantum) for b in ours], strict=True)) if ours else (0, 0)
    outcome = agreed(binomial(over, arrivals).outcome(most=0.01) for over in (least, most))
    over = f"{least}" if least == most else f"{least} to {most}"
    yield _bar("preemption latency P99, at most one P99 quantum", f"≤ {quantum * 1e3:.1f} ms",
               f"{over} of {arrivals} requests waited longer, the longest {longest * 1e3:.1f} ms", outcome,
               bool(ours))  # fmt: skip
    counts = [b.preemption.count / b.preemption.arrivals for b in ours if b.preemption]
    worst = max(counts, default=math.nan)
    yield _bar("preemptions per arriving request", "≤ 1", f"{worst:.2f} in the worst block, counted",
               Outcome.MET if worst <= 1 else Outcome.MISSED, bool(ours))  # fmt: skip


def _longer(block: Block, quantum: float) -> tuple[int, int]:
    """Return the least and the most requests of a block that waited longer for a quantum than `quantum` seconds."""
    waits = block.preemption
    if waits is None or waits.longest_s <= quantum:
        return 0, 0
    return 1, math.ceil(waits.count / 100) if waits.p99_s <= quantum else waits.count


def _stock(results: Results) -> Iterator[Bar]:
    ours, stock = results.of("alone", "umbel_off", "stock"), results.of("alone", "stock", "stock")
    medians: tuple[tuple[str, Callable[[Block], float]], ...] = (
        ("TTFT", lambda block: quantile(values([block], "ttft"), 0.5)),
        ("TPOT", lambda block: quantile(values([block], "tpot"), 0.5)),
    )
    for name, median in medians:
        ratio = paired_ratio(ours, stock, median)
        claim = f"median {name} with training off, relative to stock SGLang"
        yield _bar(claim, "0.98–1.02", ratio.text(3), ratio.outcome(0.98, 1.02), bool(ours and stock))


def _bar(claim: str, wanted: str, measured: str, outcome: Outcome, known: bool) -> Bar:
    return Bar(claim, wanted, measured, outcome) if known else Bar(claim, wanted, NONE, Outcome.UNMEASURED)


def _together(conditions: tuple[str, ...]) -> float:
    """Return the confidence of each condition's interval, so that all of them hold with `CONFIDENCE`."""
    return 1 - (1 - CONFIDENCE) / len(conditions)


def _extreme(ratios: Mapping[str, Interval], of: Callable[[list[float]], float]) -> Interval:
    """Return the interval of the least or the largest ratio, from intervals that hold together."""
    found = list(ratios.values())
    if not found or any(math.isnan(ratio.value) for ratio in found):
        return Interval(math.nan, math.nan, math.nan, "not known in each condition" if found else "")
    note = next((ratio.note for ratio in found if ratio.note), "")
    return Interval(of([r.value for r in found]), of([r.low for r in found]), of([r.high for r in found]), note)


def _mean(blocks: list[Block], of: Callable[[Block], float]) -> float:
    return sum(map(of, blocks)) / len(blocks) if blocks else math.nan
