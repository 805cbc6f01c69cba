"""The page of every Prometheus metric, made from the tables of metrics of the site and of the centre."""

from collections.abc import Iterable

import client.metrics
import server.registry.metrics
from scripts.tools.reference.page import code, head, table
from umbel.metrics import Metric

INTRODUCTION = """
[How to scrape them and raise alerts](../how-to/scrape-metrics.md). Labels are names of adapters, versions, sites,
states and kinds: never a user, never a text.
"""
SITE = """
## At a site

Answered by `umbel serve` as `GET /metrics` on the port of `[metrics]`. Counters marked *engine* are counted by the
engine; the daemon adds up the counts of successive engines, so that no counter goes back when an engine is restarted.

"""
CENTRE = """
## At the centre

Answered by `umbel registry serve` as `GET /metrics`, from the registry and its `events.jsonl`.

"""


def render() -> str:
    """Return the whole page."""
    page = head("Metrics", "`client/metrics.py` and `server/registry/metrics.py`") + INTRODUCTION
    page += SITE + _table(client.metrics.METRICS)
    return page + CENTRE + _table(server.registry.metrics.METRICS)


def _table(metrics: Iterable[Metric]) -> str:
    return table(("metric", "type", "labels", "meaning"), map(_row, metrics))


def _row(metric: Metric) -> tuple[str, str, str, str]:
    kind = metric.kind + (" (*engine*)" if metric.restarts else "")
    return code(metric.name), kind, ", ".join(map(code, metric.labels)), metric.help
