"""Measures what a base in 4 bits costs users: time to the first token and per token, training off and on.

Four starts of a site over SmolLM2-135M, dense, packed, packed, dense (ABBA), in fp32; requests one at a time, first
while nothing is trained and then beside a round of training. `scripts/bench_quanta` measures steps of training.
"""

import argparse
import os

from scripts.tools import real_base, tiny_base
from scripts.tools.bench.overlap import compare
from scripts.tools.packed_base import packed_base
from scripts.tools.processes import end_as_ctrl_c
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
    compare(
        WAYS,
        options.requests,
        lambda folder, way: TrialSite(folder, bases[way], "bench", extra=TARGETS),
        tell_memory,
    )


def tell_memory(way: str, site: TrialSite) -> None:
    """Print the private memory of the scheduler's process before it had a trainer."""
    memory = site.status()["training"]["memory"]["before"]
    print(f"{way}: {memory / 1e6:.0f} MB private in the scheduler before there is a trainer", flush=True)


if __name__ == "__main__":
    main()
