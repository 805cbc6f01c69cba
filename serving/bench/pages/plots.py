"""`draw`: plots of a run as SVG: latencies, training over time, harvest against attainment, goodput."""

import math
from pathlib import Path
from typing import Any

from serving.bench.intervals import Interval
from serving.bench.metrics import Block, goodput, quality_goodput, values
from serving.bench.plan import CORE, FEASIBLE, SYSTEMS
from serving.bench.results import Results

BIN_S = 1.0
"""Seconds of a bin of the plot over time."""
SHOWN = "0.6"
"""Load of the latency plot."""
MISSING = 'There are no plots: they need matplotlib, `pip install -e ".[site,plots]" -c constraints/engine.txt`.'


def draw(results: Results, into: Path) -> list[tuple[str, Path]]:
    """Draw every plot that the run has blocks for; return the (title, file) of each. Needs matplotlib."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "umbel"  # the same figures give the same file
    into.mkdir(parents=True, exist_ok=True)
    drawn = [
        ("TTFT and TPOT at load 0.6", _distributions(results, into / "coexec-latency.svg")),
        ("Training over time against load", _over_time(results, into / "coexec-share.svg")),
        ("Harvest against attainment", _harvest(results, into / "coexec-harvest.svg")),
        ("Goodput", _goodput(results, into / "coexec-goodput.svg")),
    ]
    return [(title, file) for title, file in drawn if file is not None]


def _save(figure: Any, file: Path) -> Path:
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    return file


def _label(system: str) -> str:
    return SYSTEMS[system].label


def _distributions(results: Results, file: Path) -> Path | None:
    from matplotlib.figure import Figure

    systems = [system for system in CORE if results.of(SHOWN, system)]
    if not systems:
        return None
    figure = Figure(figsize=(9, 3.2))
    targets = {"ttft": results.slo.ttft_s, "tpot": results.slo.tpot_s}
    for axes, name in zip(figure.subplots(1, 2), ("ttft", "tpot"), strict=True):
        for system in systems:
            found = sorted(values(results.of(SHOWN, system), "ttft" if name == "ttft" else "tpot"))
            shares = [(n + 1) / len(found) for n in range(len(found))]
            axes.step([1e3 * value for value in found], shares, where="post", label=_label(system), linewidth=1.2)
        axes.axvline(1e3 * targets[name], color="black", linestyle=":", linewidth=1)
        axes.set(xscale="log", xlabel=f"{name.upper()}, ms", ylabel="share of requests")
    axes.legend(fontsize=7)
    return _save(figure, file)


def _over_time(results: Results, file: Path) -> Path | None:
    from matplotlib.figure import Figure

    condition = "square" if results.of("square", "ours") else SHOWN
    blocks, alone = results.of(condition, "ours"), results.of("none", "training")
    if not blocks or not alone:
        return None
    full = max(sum(block.steps for block in alone) / sum(block.window for block in alone), 1e-9)
    figure = Figure(figsize=(9, 3.2))
    axes = figure.subplots()
    times, share = _binned(blocks, full)
    axes.step(times, share, where="mid", label="training, share of training alone", linewidth=1.5)
    load = axes.twinx()
    arrivals = [request.at for block in blocks for request in block.requests]
    per_second = [sum(abs(at - time) <= BIN_S / 2 for at in arrivals) / len(blocks) / BIN_S for time in times]
    load.step(times, per_second, where="mid", color="grey", label="requests/s", linewidth=1)
    axes.set(xlabel="seconds of the block", ylabel="training, share of alone")
    axes.set_ylim(bottom=0)
    load.set_ylabel("requests/s")
    axes.legend(loc="upper left", fontsize=7)
    load.legend(loc="upper right", fontsize=7)
    return _save(figure, file)


def _binned(blocks: list[Block], full: float) -> tuple[list[float], list[float]]:
    """Return the middle of each bin, and the mean over blocks of the steps in it, relative to `full` per second."""
    import numpy as np

    edges = np.arange(0.0, blocks[0].window + 1e-9, BIN_S)
    counts = [
        np.diff(np.interp(edges, [0.0, *(at for at, _ in b.progress)], [0, *(steps for _, steps in b.progress)]))
        for b in blocks
    ]
    return (edges[:-1] + BIN_S / 2).tolist(), (np.mean(counts, axis=0) / BIN_S / full).tolist()


def _harvest(results: Results, file: Path) -> Path | None:
    """Draw a point per condition, joined in their order, with the 95 % interval of both measures."""
    from matplotlib.figure import Figure

    found = {
        system: [(results.kept(c, system), results.harvest(c, system)) for c in results.conditions]
        for system in CORE
        if system != "inference"
    }
    known = {
        system: [
            (kept, harvest) for kept, harvest in points if math.isfinite(kept.high) and math.isfinite(harvest.high)
        ]
        for system, points in found.items()
    }
    if not any(known.values()):
        return None
    figure = Figure(figsize=(9, 3.2))
    axes = figure.subplots()
    for system, points in known.items():
        x, y = [kept.value for kept, _ in points], [harvest.value for _, harvest in points]
        around = [_errors([kept for kept, _ in points]), _errors([harvest for _, harvest in points])]
        axes.errorbar(x, y, xerr=around[0], yerr=around[1], marker="o", linewidth=1, label=_label(system))
    axes.axvline(FEASIBLE, color="black", linestyle=":", linewidth=1)
    axes.set(xlabel="attainment, relative to inference only", ylabel="harvest, share of training alone")
    axes.legend(fontsize=7)
    return _save(figure, file)


def _errors(intervals: list[Interval]) -> list[list[float]]:
    """Return the distances from each value to the lower and to the upper end of its interval."""
    return [[max(0.0, one.value - one.low) for one in intervals], [max(0.0, one.high - one.value) for one in intervals]]


def _goodput(results: Results, file: Path) -> Path | None:
    from matplotlib.figure import Figure

    systems = [system for system in CORE if any(results.of(c, system) for c in results.conditions)]
    if not systems:
        return None
    figure = Figure(figsize=(9, 3.2))
    panels = figure.subplots(1, 2 if results.quality else 1, squeeze=False)[0]
    for axes, title in zip(panels, ("within targets, requests/s", "G_q"), strict=False):
        for number, system in enumerate(systems):
            heights = [_mean_goodput(results, condition, system, title) for condition in results.conditions]
            places = [n + number * 0.8 / len(systems) for n in range(len(heights))]
            axes.bar(places, heights, 0.8 / len(systems), label=_label(system))
        axes.set(xticks=[n + 0.35 for n in range(len(results.conditions))], xlabel="load", ylabel=title)
        axes.set_xticklabels(results.conditions)
    panels[0].legend(fontsize=7)
    return _save(figure, file)


def _mean_goodput(results: Results, condition: str, system: str, title: str) -> float:
    blocks = results.of(condition, system)
    found = [
        quality_goodput(block, results.slo, results.quality) if title == "G_q" else goodput(block, results.slo)
        for block in blocks
    ]
    return sum(found) / len(found) if found else math.nan
