"""`umbel bench simulate`: simulate hours of load on sites within seconds, to see how much training fits beside it."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from serving.bench.machines import PRESETS, Machine, calibrated
from serving.bench.metrics import is_largest, quantile
from serving.bench.outcome import Outcome
from serving.bench.trace import CORE, NO_TRACE, Arrival, Scale, Trace
from serving.bench.virtual import Simulation
from serving.cotrainer.governor import SloGovernor
from serving.cotrainer.slo import Slo
from umbel.errors import ConfigError

SCALES = {"cpu": CORE, "gpu": Scale()}
HEADINGS = ("site", "requests", "in time", "without training", "TTFT P50/P95/P99 ms", "TPOT P50/P95/P99 ms",
            "training share", "steps/min", "SLO debt s", "preemptions", "preemption P99 ms")  # fmt: skip


@dataclass(frozen=True)
class SiteReport:
    """One site with training, and the same requests without it. Percentiles are P50, P95 and P99 in seconds."""

    requests: int
    attainment: tuple[float, float, float]
    """Shares of the requests in time: TTFT, TPOT, both."""
    attainment_alone: tuple[float, float, float]
    ttft_s: tuple[float, ...]
    tpot_s: tuple[float, ...]
    share: float
    steps: float
    slo_debt_s: float
    preemptions: int
    preemption_s: tuple[float, ...]
    delayed: int
    """Requests that arrived while a quantum ran: those of `preemption_s`."""
    seconds: float


def strict_slo(machine: Machine, arrivals: Sequence[Arrival], seconds: float) -> Slo:
    """Return three times the median TTFT and twice the median TPOT of inference alone.

    Raises ConfigError for a load without a request of two tokens.
    """
    alone = Simulation(machine, arrivals).run(seconds)
    if not alone.tpot:
        raise ConfigError("the load has no request with two tokens to take targets from; give --slo or a higher --rate")
    return Slo.usual(ttft_s=3 * float(np.median(alone.ttft)), tpot_s=2 * float(np.median(alone.tpot)))


def simulate_site(
    machine: Machine,
    arrivals: Sequence[Arrival],
    seconds: float,
    slo: Slo,
    *,
    share_floor: float,
    share_cap: float,
    seed: int = 0,
) -> SiteReport:
    """Simulate `seconds` of load with training and without."""
    alone = Simulation(machine, arrivals, seed=seed).run(seconds)
    predictor = calibrated(machine)
    governor = SloGovernor(slo, predictor, share_floor=share_floor, share_cap=share_cap)
    both = Simulation(machine, arrivals, governor, predictor, seed=seed).run(seconds)
    return _report(both, alone, slo, governor.slo_debt_s)


def simulate_command(
    trace: Path | None,
    *,
    preset: str,
    rate: float,
    hours: float,
    sites: int = 1,
    slo: str | None = None,
    share_floor: float = 0.0,
    share_cap: float = 1.0,
    seed: int = 0,
    out: Path | None = None,
) -> str:
    """Simulate `sites` sites that see the trace from different hours on; return a table, and write `out` as JSON.

    `slo` is "ttft_ms,tpot_ms"; without it the targets are strict ones, from inference alone. Raises ConfigError for a
    value out of its range, a trace that cannot be read, and a file that cannot be written.
    """
    if preset not in PRESETS:
        raise ConfigError(f"no preset {preset!r}; there are {', '.join(PRESETS)}")
    if not all(0 < value < math.inf for value in (rate, hours, sites)):
        raise ConfigError("rate, hours and sites must be more than 0, and finite")
    if seed < 0:
        raise ConfigError(f"--seed {seed}: it must be 0 or more")
    if not (0 <= share_floor <= share_cap <= 1 and share_cap > 0):
        raise ConfigError("shares must be 0 ≤ share_floor ≤ share_cap ≤ 1, and the cap more than 0")
    if out is not None and (out.is_dir() or not out.parent.is_dir()):  # refused before hours are simulated
        raise ConfigError(f"--out {out}: cannot be written; name a file in a folder that is there")
    machine, requests, seconds = PRESETS[preset], Trace.read(trace, SCALES[preset]), hours * 3600
    load = [tuple(requests.around(rate, seconds, site / sites)) for site in range(sites)]
    targets = parse_slo(slo) if slo else strict_slo(machine, load[0], seconds)
    reports = [
        simulate_site(
            machine, arrivals, seconds, targets, share_floor=share_floor, share_cap=share_cap, seed=seed + site
        )
        for site, arrivals in enumerate(load)
    ]
    if out is not None:
        found = {
            "preset": preset,
            "rate": rate,
            "hours": hours,
            "slo": asdict(targets),
            "sites": list(map(asdict, reports)),
        }
        out.write_text(json.dumps(found, indent=2))
    return "\n".join([*([] if trace else [NO_TRACE]), *_table(reports, targets)])


def parse_slo(text: str) -> Slo:
    """Read "ttft,tpot" in milliseconds. Raises ConfigError for anything else."""
    try:
        ttft_ms, tpot_ms = (float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"--slo {text!r}: expected two numbers of milliseconds, such as 500,50") from error
    if not (0 < ttft_ms < float("inf") and 0 < tpot_ms < float("inf")):
        raise ConfigError(f"--slo {text!r}: targets must be finite and more than 0")
    return Slo.usual(ttft_ms / 1e3, tpot_ms / 1e3)


def _report(both: Outcome, alone: Outcome, slo: Slo, slo_debt_s: float) -> SiteReport:
    return SiteReport(
        requests=len(both.answered),
        attainment=both.attainment(slo),
        attainment_alone=alone.attainment(slo),
        ttft_s=_percentiles(both.ttft),
        tpot_s=_percentiles(both.tpot),
        share=both.share,
        steps=both.steps,
        slo_debt_s=slo_debt_s,
        preemptions=both.preemptions,
        preemption_s=_percentiles(both.preemption_s),
        delayed=len(both.preemption_s),
        seconds=both.seconds,
    )


def _percentiles(seconds: Sequence[float]) -> tuple[float, ...]:
    return tuple(quantile(seconds, q) for q in (0.5, 0.95, 0.99)) if seconds else (0.0, 0.0, 0.0)


def _table(reports: Sequence[SiteReport], slo: Slo) -> Iterator[str]:
    yield f"targets: TTFT {slo.ttft_s * 1e3:.0f} ms, TPOT {slo.tpot_s * 1e3:.1f} ms"
    rows = [HEADINGS, *(_row(number, report) for number, report in enumerate(reports))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    for row in rows:
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))


def _row(number: int, report: SiteReport) -> tuple[str, ...]:
    return (
        str(number),
        str(report.requests),
        f"{report.attainment[2]:.1%}",
        f"{report.attainment_alone[2]:.1%}",
        _milliseconds(report.ttft_s, report.requests),
        _milliseconds(report.tpot_s, report.requests),
        f"{report.share:.1%}",
        f"{report.steps / report.seconds * 60:.0f}",
        f"{report.slo_debt_s:.1f}",
        str(report.preemptions),
        _p99(report.preemption_s, report.delayed),
    )


def _milliseconds(seconds: Sequence[float], count: int) -> str:
    return "/".join([*(f"{value * 1e3:.1f}" for value in seconds[:2]), _p99(seconds, count)])


def _p99(seconds: Sequence[float], count: int) -> str:
    """Format the P99; "max" stands before that of so few that it is the largest."""
    return f"{'max ' if is_largest(count, 0.99) else ''}{seconds[2] * 1e3:.1f}"
