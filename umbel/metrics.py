"""`Metric`, `Totals`: metrics for Prometheus, from tables that define the name, the meaning and the source of each.

Names follow Prometheus's conventions: base units, `_total` on counters, `_info` with value 1 for texts. Values are read
from a snapshot at each scrape, so counting slows down no request and no quantum. Labels are names of versions, states
and kinds: never a user, never a text.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.core import Metric as Family

Values = Mapping[tuple[str, ...], float]
"""Label values, in the order of the labels → value; the key is `ONE` for a metric without labels."""
ONE: tuple[str, ...] = ()


@dataclass(frozen=True)
class Metric:
    """One metric, and the function that reads its values from a snapshot (a JSON-like dictionary)."""

    name: str
    kind: Literal["counter", "gauge"]
    help: str
    read: Callable[[Mapping[str, Any]], Values]
    labels: tuple[str, ...] = ()
    restarts: bool = False
    """True if its source may restart from zero while the process that is scraped lives on."""

    def __post_init__(self) -> None:
        assert self.name.startswith("umbel_")
        assert self.name.endswith("_total") == (self.kind == "counter"), self.name

    def family(self, values: Values) -> Family:
        """Return the values as a metric family of Prometheus's client."""
        kind = CounterMetricFamily if self.kind == "counter" else GaugeMetricFamily
        family = kind(self.name, self.help, labels=self.labels)
        for labels, value in sorted(values.items()):
            family.add_metric(labels, value)
        return family


class Totals:
    """Counters that continue when their source restarts from zero."""

    def __init__(self) -> None:
        self._source: object = None
        self._before: dict[tuple[str, tuple[str, ...]], float] = {}
        self._now: dict[tuple[str, tuple[str, ...]], float] = {}

    def begin(self, source: object) -> None:
        """Begin to count a run of the source; the last values of earlier runs stay counted."""
        if source != self._source:
            for key, value in self._now.items():
                self._before[key] = self._before.get(key, 0.0) + value
            self._source, self._now = source, {}

    def add_up(self, metric: Metric, values: Values) -> dict[tuple[str, ...], float]:
        """Return the values summed over all runs; values that the source does not report keep their last ones."""
        for labels, value in values.items():
            key = (metric.name, labels)
            self._now[key] = max(value, self._now.get(key, 0.0))
        known = {key for key in (*self._before, *self._now) if key[0] == metric.name}
        return {
            labels: self._before.get((name, labels), 0.0) + self._now.get((name, labels), 0.0) for name, labels in known
        }


def families(metrics: Iterable[Metric], snapshot: Mapping[str, Any], totals: Totals) -> Iterator[Family]:
    """Yield every metric of a table, with its values in one snapshot."""
    for metric in metrics:
        values = metric.read(snapshot)
        yield metric.family(totals.add_up(metric, values) if metric.restarts else values)
