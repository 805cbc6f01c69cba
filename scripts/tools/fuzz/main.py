"""Fuzzes everything that reads bytes from outside: `scripts/fuzz --seconds 600`.

Each target gets valid inputs, damaged in a few places, and arbitrary bytes (hypothesis draws and shrinks them). An
umbel error, or an HTTP status that the target documents, is an answer; any other exception is a failure, and the
shortest input that was seen to bring it about is printed and saved as `fuzz-out/<target>-<sha256>`;
`scripts/fuzz fuzz-out/<target>-<sha256>` gives it once more.

`scripts/fuzz --engine --seconds 600` starts a tiny site, real SGLang on the CPU, and sends users' requests side by side
to each of its routes: such as the router takes, with every field at its bounds, damaged ones, and the catalogue of
hostile ones; some users leave before the end. A status that is not 200, 400, 404 or 413, a connection or stream that
breaks off, an error within a stream, an engine that was started anew or does not answer a good request right after:
each is a failure.
"""

import argparse
import hashlib
import logging
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as hypothesis_seed

from scripts.tools.fuzz.target import Target
from umbel.errors import UmbelError

EXAMPLES = 200
"""Inputs of one target before the next one has its turn."""
SHOWN = 2000
"""Bytes that are printed of an input that broke something."""


def fuzz(target: Target, *, examples: int, seed: int, counts: Counter[str], out: Path) -> Path | None:
    """Give a target `examples` inputs; return the file of the smallest one that broke it, or None."""
    broken: list[tuple[bytes, Exception]] = []

    @hypothesis_seed(seed)
    @settings(
        max_examples=examples, database=None, deadline=None, suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )  # fmt: skip
    @given(target.inputs)
    def once(data: bytes) -> None:
        counts["cases"] += 1
        try:
            target.read(data)
            counts["accepted"] += 1
        except UmbelError:
            counts["refused"] += 1
        except Exception as error:
            broken.append((data, error))
            raise

    try:
        once()
    except Exception:  # whatever it is, it is what was looked for
        if not broken:
            raise
        counts["failures"] += 1
        smallest, error = min(broken, key=lambda one: len(one[0]))
        path = out / f"{target.name}-{hashlib.sha256(smallest).hexdigest()[:16]}"
        out.mkdir(parents=True, exist_ok=True)
        path.write_bytes(smallest)
        print(f"{target.name}: {type(error).__name__}: {str(error)[:500]}", flush=True)
        print(f"  {smallest[:SHOWN]!r}{'…' * (len(smallest) > SHOWN)}\n  saved: {path}", flush=True)
        return path
    return None


def main(arguments: list[str] | None = None) -> int:
    """Fuzz all targets in turns; return the number of targets that broke, which is the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long, all targets together")
    parser.add_argument("--cases", type=int, default=EXAMPLES, help="of one target before the next has its turn")
    parser.add_argument("--seed", type=int, default=None, help="the same one gives the same inputs")
    parser.add_argument("--out", type=Path, default=Path("fuzz-out"), help="where inputs that break something go")
    parser.add_argument("--engine", action="store_true", help="users' requests to a tiny site, started for it")
    parser.add_argument("input", nargs="?", type=Path, help="a saved input, to be read once more by its target")
    asked = parser.parse_args(arguments)
    logging.disable()  # what is refused is logged where it is, with a traceback
    with tempfile.TemporaryDirectory(prefix="umbel-") as folder, _targets(Path(folder), asked.engine) as every:
        if asked.input is not None:
            name = asked.input.name.rpartition("-")[0]
            next(target for target in every if target.name == name).read(asked.input.read_bytes())
            return 0
        return _rounds(every, asked)


@contextmanager
def _targets(folder: Path, engine: bool) -> Iterator[list[Target]]:
    """Give the readers of bytes, or the routes of an engine: what the one needs is not in the other's environment."""
    if engine:
        from scripts.tools.fuzz.engine import started_engine

        with started_engine(folder) as found:
            yield found
    else:
        from scripts.tools.fuzz.targets import targets

        yield targets(folder)


def _rounds(every: list[Target], asked: argparse.Namespace) -> int:
    seed = random.SystemRandom().randrange(1 << 32) if asked.seed is None else asked.seed
    counts = {target.name: Counter[str]() for target in every}
    deadline, turn, whole = time.monotonic() + asked.seconds, 0, every
    with ThreadPoolExecutor(len(every) if asked.engine else 1) as turns:  # users of an engine come side by side
        while whole and (time.monotonic() < deadline or turn == 0):
            give = partial(_turn, counts=counts, examples=asked.cases, seed=seed + turn, out=asked.out)
            whole = [target for target, broken in zip(whole, turns.map(give, whole), strict=True) if not broken]
            turn += 1
    print(f"seed {seed}, {turn} turns\n\n| target | cases | accepted | refused | failures |\n|---|---|---|---|---|")
    for name, found in [*counts.items(), ("all", sum(counts.values(), Counter[str]()))]:
        print(f"| {name} | {found['cases']} | {found['accepted']} | {found['refused']} | {found['failures']} |")
    return len(every) - len(whole)


def _turn(target: Target, *, counts: dict[str, Counter[str]], **settings: Any) -> Path | None:
    return fuzz(target, counts=counts[target.name], **settings)


if __name__ == "__main__":
    sys.exit(main())
