"""Metrics for Prometheus, from tables of definitions: what each is called, what it means, and where it is read.

Names follow Prometheus's conventions: base units, `_total` on counters, `_info` and 1 for what is text. A value is read
from a snapshot when it is asked for, so no request and no quantum pays for being counted. Labels are names of versions,
states and kinds: never a user, never a text.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.core import Metric as Family

Values = Mapping[tuple[str, ...], float]
"""Label values, in the order of the labels → value; `ONE` where there are no labels."""
ONE: tuple[str, ...] = ()


@dataclass(frozen=True)
class Metric:
    """One metric over snapshots, which are JSON-like dictionaries."""

    name: str
    kind: Literal["counter", "gauge"]
    help: str
    read: Callable[[Mapping[str, Any]], Values]
    labels: tuple[str, ...] = ()
    restarts: bool = False
    """Whether its source counts from zero again within the life of the process that is scraped."""

    def __post_init__(self) -> None:
        assert self.name.startswith("umbel_")
        assert self.name.endswith("_total") == (self.kind == "counter"), self.name

    def family(self, values: Values) -> Family:
        """As Prometheus's client writes it."""
        kind = CounterMetricFamily if self.kind == "counter" else GaugeMetricFamily
        family = kind(self.name, self.help, labels=self.labels)
        for labels, value in sorted(values.items()):
            family.add_metric(labels, value)
        return family


class Totals:
    """Counters that go on where their source began anew."""

    def __init__(self) -> None:
        self._source: object = None
        self._before: dict[tuple[str, tuple[str, ...]], float] = {}
        self._now: dict[tuple[str, tuple[str, ...]], float] = {}

    def begin(self, source: object) -> None:
        """What is read from now on is of this run of the source; what an earlier one had last stays counted."""
        if source != self._source:
            for key, value in self._now.items():
                self._before[key] = self._before.get(key, 0.0) + value
            self._source, self._now = source, {}

    def add_up(self, metric: Metric, values: Values) -> dict[tuple[str, ...], float]:
        """The values since the first run; a source that is silent now has what it had."""
        for labels, value in values.items():
            key = (metric.name, labels)
            self._now[key] = max(value, self._now.get(key, 0.0))
        known = {key for key in (*self._before, *self._now) if key[0] == metric.name}
        return {
            labels: self._before.get((name, labels), 0.0) + self._now.get((name, labels), 0.0) for name, labels in known
        }


def families(metrics: Iterable[Metric], snapshot: Mapping[str, Any], totals: Totals) -> Iterator[Family]:
    """Every metric of a table, as one snapshot has it."""
    for metric in metrics:
        values = metric.read(snapshot)
        yield metric.family(totals.add_up(metric, values) if metric.restarts else values)
