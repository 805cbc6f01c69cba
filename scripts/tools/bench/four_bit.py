"""Measures what a base in 4 bits costs users: time to the first token and per token, training off and on.

Four starts of a site over SmolLM2-135M, dense, packed, packed, dense (ABBA), in fp32; requests one at a time, first
while nothing is trained and then beside a round of training. `scripts/bench_quanta` measures steps of training.
"""

import argparse
import asyncio
import itertools
import os
import tempfile
from collections import defaultdict
from pathlib import Path

from scripts.tools import real_base, tiny_base
from scripts.tools.bench.overlap import Found, measure, show
from scripts.tools.packed_base import packed_base
from scripts.tools.processes import ENGINE_BIN, Processes, end_as_ctrl_c
from scripts.tools.repository import REPOSITORY
from scripts.tools.trial_site import TrialSite

WAYS = ("dense", "4 bits")
SEQ_LEN = "96"
"""[training].seq_len: SmolLM2's template begins with some 30 tokens."""
TARGETS = "[slo]\nttft_ms = 1500\ntpot_ms = 300\n"


def main() -> None:
    """Measure and print medians, 95th percentiles and their ratios."""
    end_as_ctrl_c()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=12, help="in each of the four starts, training off and on each")
    parser.add_argument("--base", choices=("tiny", "real"), default="real")
    options = parser.parse_args()
    base = real_base.build() if options.base == "real" else tiny_base.build(REPOSITORY / ".cache" / "tiny-base")
    bases = dict(zip(WAYS, (base, packed_base(base)), strict=True))
    os.environ["UMBEL_SITE__TRAINING__SEQ_LEN"] = SEQ_LEN
    found: Found = defaultdict(list)
    seeds = itertools.count(1)
    for way in (*WAYS, *reversed(WAYS)):
        with tempfile.TemporaryDirectory(prefix="umbel-") as name:
            processes = Processes(Path(name) / "logs")
            try:
                site = TrialSite(Path(name), bases[way], "bench", extra=TARGETS)
                processes.start("site", [str(ENGINE_BIN / "umbel"), "serve", str(site.file)])
                processes.wait_for(site.starts, "the site's start", 300)
                memory = site.status()["training"]["memory"]["before"]
                print(f"{way}: {memory / 1e6:.0f} MB private in the scheduler before there is a trainer", flush=True)
                asyncio.run(measure(site, way, options.requests, seeds, found))
            finally:
                processes.stop()
    show(found, WAYS)


if __name__ == "__main__":
    main()
