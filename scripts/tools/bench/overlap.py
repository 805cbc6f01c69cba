"""Measures what SGLang's overlap loop costs on a CPU: time to the first token and per token, training off and on.

Four starts of one site, with the loop, without it, without it, with it (ABBA); requests one at a time, as users who are
alone send them, first while nothing is trained and then beside a round of training.
"""

import argparse
import asyncio
import itertools
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from scripts.tools import tiny_base
from scripts.tools.processes import ENGINE_BIN, ProcessError, Processes, end_as_ctrl_c
from scripts.tools.repository import REPOSITORY
from scripts.tools.trial_site import TrialSite, random_adapter, require_done
from serving.bench.load import Client, Outcome
from serving.bench.metrics import quantile
from serving.bench.trace import Arrival

REQUEST = Arrival(0.0, prompt=64, output=16)
PROMPT_IDS = range(300, 1500)
"""Token ids that prompts are drawn from."""
FIRST_REQUESTS = 10
"""Requests after a start that are not counted: the first ones are slow."""
DRAIN_S = 60.0
PAUSE_S = 0.05
"""Between two requests."""
SETTLE_S = 3.0
"""After a round of training has begun: its files are open and the pieces have their size."""
TARGETS = "[slo]\nttft_ms = 150\ntpot_ms = 30\n"
Found = dict[tuple[str, str], list[Outcome]]
"""(way of serving, training off or on) → answers."""
WAYS = ("overlap loop", "umbel's default")


def main() -> None:
    """Measure and print medians, 95th percentiles and their ratios."""
    end_as_ctrl_c()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=60, help="in each of the four starts, training off and on each")
    compare(WAYS, parser.parse_args().requests, a_site)


def a_site(folder: Path, way: str) -> TrialSite:
    """Make a site over the tiny base with SGLang's overlap loop, or with umbel's default for a CPU."""
    site = TrialSite(folder, tiny_base.build(REPOSITORY / ".cache" / "tiny-base"), "bench", extra=TARGETS)
    if way == WAYS[0]:
        flags = "[engine.extra_args]\n"
        text = site.file.read_text().replace(flags, f"{flags}disable_overlap_schedule = false\n")
        site.file.write_text(text)
    return site


def compare(
    ways: tuple[str, str], count: int, make: Callable[[Path, str], TrialSite],
    tell: Callable[[str, TrialSite], None] = lambda way, site: None,
) -> None:  # fmt: skip
    """Start the site that `make` makes for each way of serving, in the order ABBA, measure each, and print the ratios.

    `tell` is called with each site that has started, before it is asked anything.
    """
    found: Found = defaultdict(list)
    seeds = itertools.count(1)
    for way in (*ways, *reversed(ways)):
        with tempfile.TemporaryDirectory(prefix="umbel-") as name:
            processes = Processes(Path(name) / "logs")
            try:
                site = make(Path(name), way)
                processes.start("site", [str(ENGINE_BIN / "umbel"), "serve", str(site.file)])
                processes.wait_for(site.starts, "the site's start", 300)
                tell(way, site)
                asyncio.run(measure(site, way, count, seeds, found))
            finally:
                processes.stop()
    show(found, ways)


async def measure(site: TrialSite, way: str, count: int, seeds: Iterator[int], found: Found) -> None:
    """Add the answers to `count` requests without training and to as many beside it."""
    client = Client(site.url, "tiny", PROMPT_IDS)

    async def ask() -> Outcome:
        (answer,) = await client.run((REQUEST,), next(seeds), DRAIN_S, time.perf_counter())
        if not answer.ok:
            raise ProcessError(f"a request was not answered: {answer}")
        return answer

    try:
        for _ in range(FIRST_REQUESTS):
            await ask()
        for training in ("off", "on"):
            if training == "on":
                parent = random_adapter(site.model, seed=7, b_std=0.0)
                require_done(site.submit("bench", parent, steps=1_000_000, seconds=600))
                await asyncio.sleep(SETTLE_S)
            for _ in range(count):
                found[way, training].append(await ask())
                await asyncio.sleep(PAUSE_S)
    finally:
        await client.close()


def show(found: Found, ways: tuple[str, str]) -> None:
    """Print the first way of serving → the second one, and their ratio."""
    print(f"{ways[0]} → {ways[1]}")
    for training in ("off", "on"):
        for name in ("ttft", "tpot"):
            one, other = ([1e3 * getattr(answer, name) for answer in found[way, training]] for way in ways)
            columns = []
            for q in (0.5, 0.95):
                before, after = quantile(one, q), quantile(other, q)
                columns.append(f"P{q * 100:.0f} {before:5.1f} → {after:5.1f} ms ({after / before:.2f})")
            print(f"training {training:3}  {name.upper()} {', '.join(columns)};  {len(one)} requests each")


if __name__ == "__main__":
    main()
