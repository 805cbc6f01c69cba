"""The command that sizes a site: one seed is one run, and training takes what serving leaves."""

import json
from pathlib import Path

import pytest

from serving.bench.machines import PRESETS
from serving.bench.simulate import parse_slo, simulate_command, simulate_site, strict_slo
from serving.bench.trace import Arrival
from serving.cotrainer.slo import Slo
from tests.toys.serving.blocks import minute_of_requests
from umbel.errors import ConfigError


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return minute_of_requests(tmp_path)


def test_the_same_seed_is_the_same_run() -> None:
    arrivals = [Arrival(n / 3, 60, 8) for n in range(30)]
    runs = [
        simulate_site(PRESETS["cpu"], arrivals, 10.0, Slo.usual(0.1, 0.02), share_floor=0.0, share_cap=1.0, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("preset", PRESETS)
def test_training_takes_what_serving_leaves(preset: str) -> None:
    """At a low load: most of the time is training's, and nearly as many are in time as without."""
    arrivals = [Arrival(n / 2 + 0.01, 60, 8) for n in range(120)]
    report = simulate_site(
        PRESETS[preset], arrivals, 60.0, strict_slo(PRESETS[preset], arrivals, 60.0), share_floor=0.0, share_cap=1.0
    )
    assert report.requests == 120
    assert report.share > 0.5
    assert report.attainment[2] >= 0.95 * report.attainment_alone[2]
    assert report.preemptions <= report.requests
    assert report.slo_debt_s == 0.0


def test_the_command_says_what_there_is_room_for(trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "sites.json"
    table = simulate_command(trace, preset="gpu", rate=1.0, hours=0.01, sites=2, slo="500,50", out=out)
    assert len(table.splitlines()) == 1 + 1 + 2
    found = json.loads(out.read_text())
    assert found["slo"]["tpot_s"] == 0.05
    assert [site["requests"] for site in found["sites"]] == [36, 36]
    assert all(site["attainment"][2] == 1.0 and site["share"] > 0.5 for site in found["sites"])


@pytest.mark.parametrize("slo", ["500", "a,b", "500,0", "500,nan", "1,2,3"])
def test_targets_that_are_none_are_refused(slo: str) -> None:
    with pytest.raises(ConfigError, match="--slo"):
        parse_slo(slo)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"preset": "tpu"}, "no preset"),
        ({"rate": 0.0}, "more than 0"),
        ({"hours": float("nan")}, "finite"),
        ({"rate": float("inf")}, "finite"),
        ({"seed": -1}, "--seed"),
        ({"share_floor": 0.5, "share_cap": 0.4}, "share_floor"),
    ],
)
def test_a_wrong_setting_is_refused(trace: Path, wrong: dict[str, object], words: str) -> None:
    settings = {"preset": "cpu", "rate": 1.0, "hours": 0.01, **wrong}
    with pytest.raises(ConfigError, match=words):
        simulate_command(trace, **settings)  # type: ignore[arg-type]


def test_without_a_trace_the_table_says_so() -> None:
    table = simulate_command(None, preset="cpu", rate=1.0, hours=0.01)
    assert table.startswith("no trace was given")
