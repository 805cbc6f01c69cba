"""Fault points: free without the variable, exact with it, and every one of them is rehearsed."""

import re
import signal
import subprocess
import sys

import pytest

from scripts.tools.repository import REPOSITORY
from tests.toys.fault_points import CENTRE, SITE
from umbel import faults
from umbel.errors import ConfigError
from umbel.faults import Point, reach

ROOT = REPOSITORY
SCRIPT = "from umbel.faults import Point, reach\nfor step in range(5): print(step, flush=True); reach(Point.LOAD_BEGUN)"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    faults._reached.clear()
    monkeypatch.setattr(faults, "_kill_engine", [])


def test_without_the_variable_a_point_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(faults.VARIABLE, raising=False)
    for point in Point:
        reach(point)
    assert not faults._reached


@pytest.mark.parametrize(("plan", "steps"), [("load.begun", 1), ("load.begun:3", 3), ("swept, load.begun:2", 2)])
def test_a_process_dies_there_and_nowhere_before(plan: str, steps: int) -> None:
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={faults.VARIABLE: plan}, cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert process.stdout.split() == [str(step) for step in range(steps)]


def test_an_engine_is_killed_in_its_place_once(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[str] = []
    monkeypatch.setenv(faults.VARIABLE, "load.begun:2@engine,promote.told@engine")
    faults.kill_engine_with(lambda: killed.append("an engine that is gone"))
    faults.kill_engine_with(lambda: killed.append("engine"))
    seen = []
    for point in (Point.LOAD_BEGUN, Point.LOAD_BEGUN, Point.LOAD_BEGUN, Point.PROMOTE_TOLD, Point.PROMOTE_TOLD):
        reach(point)
        seen.append(len(killed))
    assert (seen, set(killed)) == ([0, 1, 1, 2, 2], {"engine"})


@pytest.mark.parametrize("plan", ["promote.jurnalled", "", "promote.told:x", "promote.told@router", "LOAD_BEGUN"])
def test_a_point_that_there_is_not_is_refused_with_those_there_are(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(faults.VARIABLE, plan)
    with pytest.raises(ConfigError, match=r"not a fault point; write POINT, .* receive\.written, .* gc\.removed"):
        reach(Point.SWEPT)


def test_every_point_stands_in_the_code_and_is_rehearsed() -> None:
    code = "".join(path.read_text() for name in ("client", "server") for path in (ROOT / name).glob("**/*.py"))
    reached = {Point[name] for name in re.findall(r"reach\(Point\.(\w+)\)", code)}
    for move in re.findall(r"faults\.([A-Z_]+)\b", code):
        reached |= set(getattr(faults, move))
    assert reached == set(Point)
    rehearsed = {Point(die_at.partition(":")[0]) for die_at in (*SITE, *CENTRE)}
    assert rehearsed == set(Point)
