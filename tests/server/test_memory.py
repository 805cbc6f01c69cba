"""The ServerApp's memory does not grow with the number of sites: real rounds, each in a process of its own."""

import json
import os
import subprocess
import sys

import pytest

from scripts.tools.repository import REPOSITORY

pytestmark = pytest.mark.slow


def measure(strategy: str, sites: int) -> dict[str, int]:
    command = [sys.executable, "-m", "tests.toys.server_memory", strategy, str(sites)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    measured: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    assert measured["sites"] == sites
    return measured


@pytest.mark.parametrize("strategy", ["exact", "fedit"])
def test_eighty_sites_take_no_more_memory_than_eight(strategy: str) -> None:
    few, many = measure(strategy, 8), measure(strategy, 80)
    print({"strategy": strategy, "8": few["peak"] / few["adapter"], "80": many["peak"] / many["adapter"]})
    assert many["peak"] <= 1.3 * few["peak"]
