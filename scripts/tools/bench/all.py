"""Run every benchmark, one after the other, and put the output of each into docs/benchmarks.md, word for word."""

import argparse
import re
import subprocess
import sys
from pathlib import Path

from scripts.tools.repository import REPOSITORY

PAGE = REPOSITORY / "docs" / "benchmarks.md"
COMMANDS = {
    "memory": ["scripts/bench_memory"],
    "quanta": ["scripts/bench_quanta"],
    "slack": ["scripts/bench_slack"],
    "overlap": ["scripts/bench_overlap"],
    "four-bit": ["scripts/bench_four_bit"],
    "adapters": ["scripts/bench_adapters"],
    "aggregate": [
        "scripts/bench_aggregate",
        "--dense",
        "smallest",
        "--threads",
        "2",
        "--methods",
        "exact",
        "fedit",
        "dense SVD",
        "peft svd",
    ],
    "swap": ["scripts/bench_swap"],
    "demo": ["scripts/demo"],
    "coexec": [".venv-engine/bin/umbel", "bench", "coexec", "--docs", str(PAGE)],
}
"""Section → command. The last one writes its section itself, because that has tables and plots."""


def main() -> None:
    """Run the chosen benchmarks; end with the output of one that fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path, nargs="?", help="a CSV in the format of the Azure LLM inference trace")
    parser.add_argument("--only", choices=COMMANDS, action="append", help="may be repeated; default: all")
    options = parser.parse_args()
    for name in options.only or COMMANDS:
        command = COMMANDS[name]
        if name == "coexec":
            trace = ["--trace", str(options.trace.resolve())] if options.trace else []
            subprocess.run([*command, *trace], cwd=REPOSITORY, check=True)
            continue
        print("running", *command, flush=True)
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
        PAGE.write_text(replaced(PAGE.read_text(), name, done.stdout))


def replaced(page: str, name: str, output: str) -> str:
    """Return the page with new figures in a section. Raises ValueError unless the section is there once."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    lines = (line.rstrip() for line in output.replace(f"{REPOSITORY}/", "").strip().splitlines())
    block = "\n".join([begin, "```text", *lines, "```", end])
    new, count = re.subn(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: block, page, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"{PAGE}: {begin} … {end} is there {count} times; it must be there once")
    return new


if __name__ == "__main__":
    main()
