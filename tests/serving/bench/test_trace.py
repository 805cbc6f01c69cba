"""Arrivals are fixed before a run, have the wanted rate, and keep the trace's rhythm."""

from pathlib import Path

import numpy as np
import pytest

from serving.bench.trace import CORE, ArrivalProcess, Scale, Trace
from tests.toys.serving.blocks import minute_of_requests
from umbel.errors import ConfigError

CSV = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.0000000,374,44
2023-11-16 18:15:48.0000000,8000,1600
2023-11-16 18:15:49.0000000,16,8
2023-11-16 18:15:50.0000000,160,32
"""


@pytest.fixture
def trace(tmp_path: Path) -> Trace:
    (tmp_path / "trace.csv").write_text(CSV)
    return Trace.read(tmp_path / "trace.csv")


def test_a_trace_is_scaled_and_capped(trace: Trace) -> None:
    assert trace.lengths == [(23, 2), (CORE.prompt, CORE.output), (1, 1), (10, 2)]


def test_a_replay_has_the_wanted_rate_and_the_traces_rhythm(trace: Trace) -> None:
    arrivals = trace.replay(rate=1.5, seconds=2.0, start=0.0)
    assert [arrival.at for arrival in arrivals] == pytest.approx([0.0, 1.0, 1.5])
    assert [(arrival.prompt, arrival.output) for arrival in arrivals] == trace.lengths[:3]
    assert trace.replay(rate=1.5, seconds=2.0, start=0.0) == arrivals, "fixed before the run"


def test_a_replay_longer_than_the_trace_is_refused(trace: Trace) -> None:
    with pytest.raises(ConfigError, match="4 requests, fewer than the 40"):
        trace.replay(rate=20.0, seconds=2.0, start=0.0)


@pytest.mark.parametrize(
    "content",
    [None, "", "a,b\n1,2\n", CSV.replace("374", "many"), CSV.splitlines()[0] + "\n", CSV.replace("2023-", "x")],
)
def test_what_is_no_trace_is_refused_by_name(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "trace.csv").write_text(content)
    with pytest.raises(ConfigError, match=r"trace\.csv: (not a trace|a trace of 0 requests)"):
        Trace.read(tmp_path / "trace.csv")


def test_without_a_trace_lengths_are_like_the_published_ones() -> None:
    lengths = np.array(Trace.fitted().lengths)
    assert np.median(lengths, axis=0) == pytest.approx([1020 / 16, 129 / 16], rel=0.1)


@pytest.mark.parametrize(("load", "cv"), [("poisson", 1.0), ("gamma:4", 4.0), ("gamma:0.5", 0.5)])
def test_another_process_gives_the_same_requests_other_gaps(load: str, cv: float) -> None:
    trace = Trace.fitted()
    process = ArrivalProcess.parse(load)
    arrivals = trace.replay(20.0, 500.0, 0.1, process)
    assert [(a.prompt, a.output) for a in arrivals] == [(a.prompt, a.output) for a in trace.replay(20.0, 500.0, 0.1)]
    assert arrivals == trace.replay(20.0, 500.0, 0.1, process), "fixed before the run"
    gaps = np.diff([arrival.at for arrival in arrivals])
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)
    assert arrivals[0].at == 0.0
    assert arrivals[-1].at < 500.0


@pytest.mark.parametrize(
    "text", ["", "burst", "gamma", "gamma:", "gamma:0", "gamma:-1", "gamma:nan", "gamma:11", "poisson:2"]
)
def test_a_process_that_is_none_is_refused_with_those_there_are(text: str) -> None:
    with pytest.raises(ConfigError, match=rf"--load {text}: expected trace, poisson, or gamma:CV"):
        ArrivalProcess.parse(text)


def test_a_square_wave_is_low_in_the_first_half_of_each_period() -> None:
    times = np.array([a.at for a in Trace.fitted().square(low=5, high=20, seconds=600, period=10, seed=0)])
    high = (times % 10) >= 5
    assert high.sum() / 300 == pytest.approx(20, rel=0.1)
    assert (~high).sum() / 300 == pytest.approx(5, rel=0.15)


@pytest.fixture
def minute_trace(tmp_path: Path) -> Path:
    return minute_of_requests(tmp_path)


def test_a_trace_keeps_its_rate_round_and_round(minute_trace: Path) -> None:
    arrivals = list(Trace.read(minute_trace, Scale()).around(rate=4.0, seconds=100.0, start=0.5))
    assert len(arrivals) == pytest.approx(400, abs=1)
    assert [(a.prompt, a.output) for a in arrivals[:2]] == [(130, 11), (131, 12)]
    assert [a.at for a in arrivals] == sorted(a.at for a in arrivals)
    assert arrivals[0].at == 0.0
