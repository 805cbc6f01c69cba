"""The simulator: an engine that can be calculated by hand, and the command that sizes a site with it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from serving.bench.machines import PRESETS, Machine, TimedQuantum
from serving.bench.simulate import parse_slo, simulate_command, simulate_site, strict_slo
from serving.bench.trace import Arrival, Scale, Trace
from serving.bench.virtual import Simulation
from serving.cotrainer.governor import Load, Slo
from serving.cotrainer.predictor import Batch
from umbel.errors import ConfigError

MACHINE = Machine(
    decode=(0.010, 0.001, 0.0), prefill=(0.010, 0.001, 0.0), quanta=(TimedQuantum("mlp", 64, 0.004),) * 2,
    noise=0.0, hiccup=(0.0, 1.0), turn_s=0.0, max_running=2, chunk_tokens=50,
)  # fmt: skip


class Always:
    """A governor that never says no."""

    slo: Slo | None = None

    def budget(self, load: Load, now: float) -> float:
        return 0.009

    def wait(self, now: float) -> float:
        return 0.0

    def ran(self, seconds: float, now: float) -> None: ...

    def iterated(self, batch: Batch, seconds: float) -> None: ...

    def finished(self, request: object) -> None: ...


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    rows = [f"2023-11-16 18:15:{second:02d}.0000000,{100 + second},{1 + second % 20}" for second in range(60)]
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    return path


def test_one_request_alone() -> None:
    """30 prompt tokens, then two decodes of one request."""
    [answer] = Simulation(MACHINE, [Arrival(1.0, 30, 3)]).run(2.0).answered
    assert (answer.ttft, answer.tpot) == (pytest.approx(0.040), pytest.approx(0.011))


def test_prompts_wait_for_each_other_and_for_room() -> None:
    """Two are prefilled at once, in chunks of 50 tokens; the third waits until one of them has been answered."""
    arrivals = [Arrival(0.0, 30, 2), Arrival(0.0, 40, 2), Arrival(0.0, 10, 1)]
    first, second, third = Simulation(MACHINE, arrivals).run(0.0).answered
    assert (first.ttft, second.ttft) == (pytest.approx(0.060), pytest.approx(0.090))
    assert third.ttft == pytest.approx(0.090 + 0.012 + 0.020)


def test_quanta_take_turns_with_iterations() -> None:
    """Two quanta fit before each decode; before a prefill of one that waits there is one, as in the co-trainer."""
    simulation = Simulation(MACHINE, [Arrival(0.0, 30, 4)], Always())
    [answer] = simulation.run(0.0).answered
    assert (answer.ttft, answer.tpot) == (pytest.approx(0.004 + 0.040), pytest.approx(0.011 + 2 * 0.004))
    assert simulation.outcome.trained_s == pytest.approx(7 * 0.004)


def test_an_overlapped_quantum_delays_by_a_part() -> None:
    [answer] = Simulation(replace(MACHINE, overlap=0.25), [Arrival(0.0, 30, 4)], Always()).run(0.0).answered
    assert answer.tpot == pytest.approx(0.011 + 0.25 * 2 * 0.004)


def test_a_request_waits_for_the_quantum_that_it_meets() -> None:
    outcome = Simulation(MACHINE, [Arrival(0.0105, 30, 1)], Always()).run(0.0)
    assert outcome.preemption_s == [pytest.approx(0.012 - 0.0105)]
    assert outcome.preemptions == 1


def test_an_idle_hour_is_training() -> None:
    outcome = Simulation(MACHINE, [], Always()).run(60.0)
    assert outcome.share == pytest.approx(1.0)
    assert outcome.steps == pytest.approx(60.0 / 0.008, abs=1)


def test_the_same_seed_is_the_same_run() -> None:
    arrivals = [Arrival(n / 3, 60, 8) for n in range(30)]
    runs = [simulate_site(PRESETS["cpu"], arrivals, 10.0, Slo(0.1, 0.02), seed=seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("preset", PRESETS)
def test_training_takes_what_serving_leaves(preset: str) -> None:
    """At a low load: most of the time is training's, and nearly as many are in time as without."""
    arrivals = [Arrival(n / 2 + 0.01, 60, 8) for n in range(120)]
    report = simulate_site(PRESETS[preset], arrivals, 60.0, strict_slo(PRESETS[preset], arrivals, 60.0))
    assert report.requests == 120
    assert report.share > 0.5
    assert report.attainment[2] >= 0.95 * report.attainment_alone[2]
    assert report.preemptions <= report.requests
    assert report.slo_debt_s == 0.0


def test_a_trace_keeps_its_rate_round_and_round(trace: Path) -> None:
    arrivals = list(Trace.read(trace, Scale()).around(rate=4.0, seconds=100.0, start=0.5))
    assert len(arrivals) == pytest.approx(400, abs=1)
    assert [(a.prompt, a.output) for a in arrivals[:2]] == [(130, 11), (131, 12)]
    assert [a.at for a in arrivals] == sorted(a.at for a in arrivals)
    assert arrivals[0].at == 0.0


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
