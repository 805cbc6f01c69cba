"""Measures a site under mixed load while its live version changes every few seconds: failures, latency, memory.

A cycle: 5 calm seconds ("before"); a new version is pushed, loaded and probed; the flip, which is its promotion in one
cycle and a roll-back in the next; 5 seconds "after". Both windows see the same load, in turn, all the way through.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from scripts.tools import tiny_base
from scripts.tools.bench.swap_users import GOOD, Answer, Users
from scripts.tools.processes import ENGINE_BIN, Processes, end_as_ctrl_c
from scripts.tools.repository import REPOSITORY
from scripts.tools.trial_site import LENIENT, TrialSite, random_adapter
from serving.bench.intervals import resampled
from serving.bench.load import sleep_until
from umbel.adapter import AdapterRef

CYCLE_S, CALM_S, FLIP_S, AFTER_S = 20.0, 5.0, 12.0, 5.0
"""Seconds of a cycle: its length, the end of "before", the flip, and the length of "after"."""
SAMPLE_S = 5.0
WARM_UP = 0.3
"""Share of the run in which memory settles; it does not count for the growth."""


@dataclass
class Swaps:
    """The times of all events, on the clock of `perf_counter`."""

    cycles: list[float] = field(default_factory=list)
    loads: list[tuple[float, float]] = field(default_factory=list)
    flips: list[float] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)
    """(time, private MB of all the site's processes)."""
    promotions: int = 0
    roll_backs: int = 0


def main() -> None:
    """Run the site and its users; the exit status is 1 if a request was answered wrongly."""
    end_as_ctrl_c()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--rate", type=float, default=5.0, help="requests per second")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="umbel-") as name:
        processes = Processes(Path(name) / "logs")
        try:
            site = Site(Path(name), processes)
            users, swaps = Users(site.url, options.rate), Swaps()
            asyncio.run(measure(site, users, swaps, options.minutes * 60))
        finally:
            processes.stop()
    sys.exit(show(users, swaps, options.minutes, options.rate))


class Site(TrialSite):
    """`umbel serve` over the tiny base, started and ready."""

    def __init__(self, folder: Path, processes: Processes) -> None:
        super().__init__(folder, tiny_base.build(REPOSITORY / ".cache" / "tiny-base"), "bench", extra=LENIENT)
        daemon = processes.start("site", [str(ENGINE_BIN / "umbel"), "serve", str(self.file)])
        self._process = psutil.Process(daemon.pid)
        processes.wait_for(self.starts, "the site's start", 300)

    def load(self, version: int) -> AdapterRef:
        """Have the site load and probe a new version, whose answers differ from every other one's."""
        return self.offer(version, random_adapter(self.model, version))

    def resident_mb(self) -> float:
        """Return the private memory (USS) of all the site's processes in MB."""
        family = [self._process, *self._process.children(recursive=True)]
        return float(sum(process.memory_full_info().uss for process in family)) / 1e6


async def measure(site: Site, users: Users, swaps: Swaps, seconds: float) -> None:
    """Promote two versions, then let users ask while versions are swapped, for whole cycles."""
    for version in (1, 2):
        site.promote(site.load(version)).raise_for_status()
    end = time.perf_counter() + max(1.0, seconds // CYCLE_S) * CYCLE_S
    async with asyncio.TaskGroup() as group:
        group.create_task(users.ask(end))
        group.create_task(sample(site, swaps, end))
        group.create_task(swap(site, swaps, end))


async def swap(site: Site, swaps: Swaps, end: float) -> None:
    """Promote a new version in one cycle and roll it back in the next, until `end`."""
    version = 2
    while time.perf_counter() < end:
        begin = time.perf_counter()
        swaps.cycles.append(begin)
        await asyncio.sleep(CALM_S)
        promotes = len(swaps.cycles) % 2 == 1
        if promotes:
            version += 1
            loading = time.perf_counter()
            ref = await asyncio.to_thread(site.load, version)
            swaps.loads.append((loading, time.perf_counter()))
        await sleep_until(begin + FLIP_S)
        swaps.flips.append(time.perf_counter())
        if promotes:
            (await asyncio.to_thread(site.promote, ref)).raise_for_status()
            swaps.promotions += 1
        else:
            (await asyncio.to_thread(site.roll_back)).raise_for_status()
            swaps.roll_backs += 1
        await sleep_until(begin + CYCLE_S)


async def sample(site: Site, swaps: Swaps, end: float) -> None:
    """Record the site's memory every `SAMPLE_S` seconds, until `end`."""
    while time.perf_counter() < end:
        swaps.memory.append((time.perf_counter(), await asyncio.to_thread(site.resident_mb)))
        await asyncio.sleep(SAMPLE_S)


def show(users: Users, swaps: Swaps, minutes: float, rate: float) -> int:
    """Print the figures; return 1 if a good request failed, a wrong one got through, or versions were mixed."""
    failed, mixed = users.failed(), users.mixed()
    kinds = {kind: sum(answer.kind == kind for answer in users.answers) for kind in {a.kind for a in users.answers}}
    print(f"{minutes:g} minutes at {rate:g} requests/s, {swaps.promotions} promotions, {swaps.roll_backs} roll-backs")
    print("requests: " + ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())))
    good = sum(answer.kind in GOOD for answer in failed)
    print(f"failed: {good} good ones, {len(failed) - good} others; versions mixed: {len(mixed)}")
    for line in [f"  {answer.kind}: {answer.trouble}" for answer in failed[:10]] + mixed[:10]:
        print(line)
    before = [ttfts(users.answers, begin, begin + CALM_S) for begin in swaps.cycles[: len(swaps.flips)]]
    after = [ttfts(users.answers, flip, flip + AFTER_S) for flip in swaps.flips]
    for quantile in (0.5, 0.95, 0.99):
        print(ratio(before, after, quantile))
    gaps = [gap for answer in users.answers for gap in answer.gaps]
    loading = [length for at, length in gaps if any(a <= at <= b + 0.5 for a, b in swaps.loads)]
    other = [length for at, length in gaps if not any(a <= at <= b + 0.5 for a, b in swaps.loads)]
    print(f"longest silence in a stream: {1e3 * max(loading, default=0):.0f} ms while a version is loaded and probed, "
          f"{1e3 * max(other, default=0):.0f} ms at other times")  # fmt: skip
    print(growth(swaps.memory))
    return int(bool(failed or mixed))


def ttfts(answers: list[Answer], begin: float, end: float) -> list[float]:
    """Return the seconds to the first token of all good streams that were due in [begin, end)."""
    return [a.ttft for a in answers if a.kind == "stream" and not a.trouble and begin <= a.at < end]


def ratio(before: list[list[float]], after: list[list[float]], quantile: float) -> str:
    """Describe a quantile before and after, over all cycles, and their ratio with a 95 % bootstrap interval."""
    old, new = (1e3 * float(np.quantile(np.concatenate(samples), quantile)) for samples in (before, after))
    apart = resampled(after, before, quantile)
    counts = f"{sum(map(len, before))} and {sum(map(len, after))} requests"
    return (f"TTFT P{100 * quantile:g}: {old:.1f} ms before, {new:.1f} ms in the {AFTER_S:g} s after a flip: "
            f"{apart.value:.3f} × ({apart.low:.3f} to {apart.high:.3f}), {counts}")  # fmt: skip


def growth(memory: list[tuple[float, float]]) -> str:
    """Describe the memory at the start, after the warm-up and at the end, and its slope after the warm-up."""
    settled = np.array(memory[int(len(memory) * WARM_UP) :])
    hours = (settled[:, 0] - settled[0, 0]) / 3600
    slope = np.polyfit(hours, settled[:, 1], 1)[0] if len(settled) > 2 else float("nan")
    return (f"private memory of the site's processes: {memory[0][1]:.0f} MB at the start, {settled[0, 1]:.0f} MB after "
            f"warm-up, {settled[-1, 1]:.0f} MB at the end: {slope:+.0f} MB per hour")  # fmt: skip


if __name__ == "__main__":
    main()
