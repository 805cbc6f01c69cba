"""Fuzzes everything that reads bytes from outside: `scripts/fuzz --seconds 600`.

Each target gets valid inputs, damaged in a few places, and arbitrary bytes (hypothesis draws and shrinks them). An
umbel error, or an HTTP status that the target documents, is an answer; any other exception is a failure, and the
shortest input that was seen to bring it about is saved as `fuzz-out/<target>-<sha256>`.
"""

import argparse
import hashlib
import logging
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st

from scripts.tools.fuzz.targets import Target, targets
from umbel.errors import UmbelError

EXAMPLES = 200
"""Inputs of one target before the next one has its turn."""
TOKENS = [
    b"\x00", b"\xff", b"[", b"{", b'"', b"\\ud800", b"NaN", b"-1", b"1e999", b"9" * 40, b"null", b"../", b"\r\n",
    b"@v1", b"\xde\xff\xff", b"\xc7\x0c\xff", b"\x80", b"[" * 2000,
]  # fmt: skip


@st.composite
def damaged(draw: Any, seeds: list[bytes]) -> bytes:
    """Draw a valid input with up to five cuts, flipped bytes, repetitions and insertions."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 5))):
        at, length = draw(st.integers(0, len(data))), draw(st.integers(1, 8))
        change = draw(st.sampled_from(("cut", "flip", "repeat", "insert", "token", "end")))
        if change == "cut":
            del data[at : at + length]
        elif change == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif change == "repeat":
            data[at:at] = data[at : at + length] * draw(st.integers(1, 50))
        elif change == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=8))
        elif change == "token":
            data[at:at] = draw(st.sampled_from(TOKENS))
        else:
            del data[at:]
    return bytes(data)


def fuzz(target: Target, *, examples: int, seed: int, counts: Counter[str], out: Path) -> Path | None:
    """Give a target `examples` inputs; return the file of the smallest one that broke it, or None."""
    broken: list[bytes] = []

    @hypothesis_seed(seed)
    @settings(
        max_examples=examples, database=None, deadline=None, suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )  # fmt: skip
    @given(damaged(target.seeds) | st.binary(max_size=300))
    def once(data: bytes) -> None:
        counts["cases"] += 1
        try:
            target.read(data)
            counts["accepted"] += 1
        except UmbelError:
            counts["refused"] += 1
        except Exception:
            broken.append(data)
            raise

    try:
        once()
    except Exception as error:  # whatever it is, it is what was looked for
        counts["failures"] += 1
        smallest = min(broken, key=len)
        path = out / f"{target.name}-{hashlib.sha256(smallest).hexdigest()[:16]}"
        out.mkdir(parents=True, exist_ok=True)
        path.write_bytes(smallest)
        print(f"{target.name}: {type(error).__name__}: {str(error)[:300]}\n  saved: {path}", flush=True)
        return path
    return None


def main(arguments: list[str] | None = None) -> int:
    """Fuzz all targets in turns; return the number of targets that broke, which is the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long, all targets together")
    parser.add_argument("--cases", type=int, default=EXAMPLES, help="of one target before the next has its turn")
    parser.add_argument("--seed", type=int, default=None, help="the same one gives the same inputs")
    parser.add_argument("--out", type=Path, default=Path("fuzz-out"), help="where inputs that break something go")
    parser.add_argument("input", nargs="?", type=Path, help="a saved input, to be read once more by its target")
    asked = parser.parse_args(arguments)
    logging.disable()  # what is refused is logged where it is, with a traceback
    with tempfile.TemporaryDirectory(prefix="umbel-") as folder:
        every = {target.name: target for target in targets(Path(folder))}
        if asked.input is not None:
            every[asked.input.name.rpartition("-")[0]].read(asked.input.read_bytes())
            return 0
        return _rounds(list(every.values()), asked)


def _rounds(every: list[Target], asked: argparse.Namespace) -> int:
    seed = random.SystemRandom().randrange(1 << 32) if asked.seed is None else asked.seed
    counts = {target.name: Counter[str]() for target in every}
    deadline, turn, broken = time.monotonic() + asked.seconds, 0, set[str]()
    while time.monotonic() < deadline or turn == 0:
        for target in every:
            if target.name not in broken and fuzz(
                target, examples=asked.cases, seed=seed + turn, counts=counts[target.name], out=asked.out
            ):
                broken.add(target.name)
        turn += 1
    print(f"seed {seed}, {turn} turns\n\n| target | cases | accepted | refused | failures |\n|---|---|---|---|---|")
    for name, found in [*counts.items(), ("all", sum(counts.values(), Counter[str]()))]:
        print(f"| {name} | {found['cases']} | {found['accepted']} | {found['refused']} | {found['failures']} |")
    return len(broken)


if __name__ == "__main__":
    sys.exit(main())
