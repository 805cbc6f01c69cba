"""Measures what SGLang's overlap loop costs on a CPU: time to the first token and per token, training off and on.

Four starts of one site, with the loop, without it, without it, with it (ABBA); requests one at a time, as users who are
alone send them, first while nothing is trained and then beside a round of training.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import httpx

from scripts.tools import tiny_base
from scripts.tools.processes import ENGINE_BIN, Processes
from scripts.tools.repository import REPOSITORY
from scripts.tools.trial_site import TrialSite, random_adapter

PROMPT, OUTPUT = 64, 16
"""Tokens of each request."""
FIRST, TOKENS = 300, 1500
"""Token ids that prompts are drawn from."""
PAUSE_S = 0.05
"""Between two requests."""
SETTLE_S = 3.0
"""After a round of training has begun: its files are open and the pieces have their size."""
TARGETS = "[slo]\nttft_ms = 150\ntpot_ms = 30\n"
Times = list[tuple[float, float]]
"""(time to the first token, mean time of each later one) of requests, in milliseconds."""


def main() -> None:
    """Measure and print medians, 95th percentiles and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=60, help="in each of the four starts, training off and on each")
    count = parser.parse_args().requests
    found: dict[tuple[bool, str], Times] = defaultdict(list)
    for overlap in (True, False, False, True):
        with tempfile.TemporaryDirectory(prefix="umbel-") as name:
            processes = Processes(Path(name) / "logs")
            try:
                measure(started(Path(name), processes, overlap), overlap, count, found)
            finally:
                processes.stop()
    show(found)


def started(folder: Path, processes: Processes, overlap: bool) -> TrialSite:
    """Start a site over the tiny base with SGLang's overlap loop, or with umbel's default for a CPU."""
    site = TrialSite(folder, tiny_base.build(REPOSITORY / ".cache" / "tiny-base"), "bench", extra=TARGETS)
    if overlap:
        flags = "[engine.extra_args]\n"
        text = site.file.read_text().replace(flags, f"{flags}disable_overlap_schedule = false\n")
        site.file.write_text(text)
    processes.start("site", [str(ENGINE_BIN / "umbel"), "serve", str(site.file)])
    processes.wait_for(site.starts, "the site's start", 300)
    return site


def measure(site: TrialSite, overlap: bool, count: int, found: dict[tuple[bool, str], Times]) -> None:
    """Add the times of `count` requests without training and of as many beside it."""
    prompts = random.Random(len(found) + count)
    for _ in range(10):
        ask(site, prompts)
    for training in ("off", "on"):
        if training == "on":
            parent = random_adapter(site.model, seed=7, b_std=0.0)
            site.submit("bench", parent, steps=1_000_000, seconds=600).raise_for_status()
            time.sleep(SETTLE_S)
        for _ in range(count):
            found[overlap, training].append(ask(site, prompts))
            time.sleep(PAUSE_S)


def ask(site: TrialSite, prompts: random.Random) -> tuple[float, float]:
    """Stream one answer to a prompt that no cache knows; return its times in milliseconds."""
    prompt = [prompts.randrange(FIRST, TOKENS) for _ in range(PROMPT)]
    body = {"model": "tiny", "prompt": prompt, "max_tokens": OUTPUT, "stream": True, "ignore_eos": True}
    began = time.perf_counter()
    arrivals = []
    with httpx.stream("POST", f"{site.url}/v1/completions", json=body, timeout=60) as reply:
        reply.raise_for_status()
        arrivals = [time.perf_counter() for line in reply.iter_lines() if '"choices"' in line]
    return (arrivals[0] - began) * 1000, (arrivals[-1] - arrivals[0]) * 1000 / (OUTPUT - 1)


def show(found: dict[tuple[bool, str], Times]) -> None:
    """Print a line for each way and its ratio to SGLang's overlap loop."""
    for training in ("off", "on"):
        with_loop, without = (zip(*found[overlap, training], strict=True) for overlap in (True, False))
        for name, loop, none in zip(("TTFT", "TPOT"), with_loop, without, strict=True):
            (loop50, loop95), (none50, none95) = middle_and_high(loop), middle_and_high(none)
            print(
                f"training {training:3}  {name} P50 {loop50:5.1f} → {none50:5.1f} ms ({none50 / loop50:.2f}), "
                f"P95 {loop95:5.1f} → {none95:5.1f} ms ({none95 / loop95:.2f});  {len(loop)} requests each"
            )


def middle_and_high(values: tuple[float, ...]) -> tuple[float, float]:
    """Return the median and the 95th percentile."""
    return statistics.median(values), statistics.quantiles(values, n=20)[-1]


if __name__ == "__main__":
    main()
