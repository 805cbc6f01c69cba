"""`coexec`: the check that `umbel bench coexec` is: short blocks with strict targets, on an engine of its own."""

from collections.abc import Callable

from scripts.tools.gpu_check.findings import Finding
from scripts.tools.gpu_check.site import CheckedSite
from serving.bench import coexec as bench
from serving.bench import results
from serving.bench.intervals import Interval, Outcome
from serving.bench.world import World

LOAD = "0.6"
"""Load of the blocks, as a part of the capacity."""
KEPT = 0.99
"""Least attainment of umbel, relative to that of inference only."""
BLOCKS = 6
"""Most blocks of a short run that `seconds` are divided between."""


def coexec(site: CheckedSite, seconds: float, say: Callable[[str], None]) -> Finding:
    """Measure attainment and harvest in blocks of `seconds` in all, after the search for the targets (half a minute).

    Few requests leave the attainment uncertain: the check fails only where the interval says that it is missed.
    """
    out, data = site.folder / "coexec", site.folder / "data.npy"
    order = bench.Order(smoke=True, window=max(1.0, seconds / BLOCKS))
    bench.run(out, order, lambda: World.of_site(site.config, data, data, site.folder / "world"), say)
    found = results.read(out)
    kept = found.kept(LOAD, "ours")
    figures = {
        "targets": {"ttft_ms": found.slo.ttft_s * 1e3, "tpot_ms": found.slo.tpot_s * 1e3},
        "capacity_per_s": found.setting.capacity,
        "requests": sum(len(block.requests) for block in found.of(LOAD, "ours")),
        "attained": {system: _ends(found.attained(LOAD, system)) for system in found.systems(LOAD)},
        "kept_of_inference_only": _ends(kept),
        "harvest": {system: _ends(found.harvest(LOAD, system)) for system in found.systems(LOAD)},
        "void_blocks": found.void,
    }
    if not (found.of(LOAD, "ours") and found.of(LOAD, "inference")):
        return Finding(figures, skipped="the client's core was too busy in the blocks that count: they are void")
    outcome = kept.outcome(least=KEPT)
    missed = f"umbel keeps {kept.text(3)} of the attainment of inference only, less than {KEPT}"
    return Finding({**figures, "claim": str(outcome)}, failed=missed if outcome is Outcome.MISSED else "")


def _ends(interval: Interval) -> dict[str, float]:
    return {"value": interval.value, "low": interval.low, "high": interval.high}
