"""Metrics read from snapshots: names, families, and counters that outlive their source."""

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from tests.toys.exposition import lint, samples
from umbel.metrics import ONE, Metric, Totals, families

STARTS = Metric("umbel_starts_total", "counter", "Starts.", lambda snapshot: {ONE: snapshot["starts"]}, restarts=True)
LOAD = Metric("umbel_load_ratio", "gauge", "Load.", lambda snapshot: {("a",): snapshot["load"]}, ("adapter",))


@pytest.mark.parametrize(
    ("name", "kind"), [("starts_total", "counter"), ("umbel_x", "counter"), ("umbel_x_total", "gauge")]
)
def test_a_name_against_the_conventions_is_refused(name: str, kind: str) -> None:
    with pytest.raises(AssertionError):
        Metric(name, kind, "x", lambda snapshot: {})  # type: ignore[arg-type]


def test_a_snapshot_becomes_prometheus_text() -> None:
    class Collector:
        def collect(self) -> object:
            return families((STARTS, LOAD), {"starts": 3, "load": 0.5}, Totals())

    registry = CollectorRegistry()
    registry.register(Collector())  # type: ignore[arg-type]
    text = generate_latest(registry).decode()
    assert lint(text) == []
    assert samples(text) == {"umbel_starts_total": 3.0, 'umbel_load_ratio{adapter="a"}': 0.5}


def test_a_counter_goes_on_where_its_source_began_anew() -> None:
    totals = Totals()
    totals.begin("first")
    assert totals.add_up(STARTS, {("mlp",): 5.0}) == {("mlp",): 5.0}
    assert totals.add_up(STARTS, {}) == {("mlp",): 5.0}, "a silent source has its last value"
    totals.begin("first")
    assert totals.add_up(STARTS, {("mlp",): 6.0}) == {("mlp",): 6.0}
    totals.begin("second")
    assert totals.add_up(STARTS, {("mlp",): 1.0, ("head",): 2.0}) == {("mlp",): 7.0, ("head",): 2.0}
    assert totals.add_up(STARTS, {("mlp",): 0.0}) == {("mlp",): 7.0, ("head",): 2.0}, "a counter never goes back"
