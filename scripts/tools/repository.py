"""`REPOSITORY`: the root folder of the checkout, for commands, benchmarks and tests."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
