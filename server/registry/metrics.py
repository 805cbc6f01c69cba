"""`CentreCollector`: the centre's Prometheus metrics, made from the registry and its events (GET /metrics)."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric as Family
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from server.registry.events import EVENTS, EventTail, LastRound
from server.registry.index import explained
from server.registry.registry import HEAD, LIVE, AdapterRegistry
from server.registry.round_log import RoundState
from umbel.errors import RegistryError
from umbel.metrics import ONE, Metric, Totals, Values, families

FINAL = tuple(state for state in RoundState if state.final)

Snapshot = Mapping[str, Any]

routes = APIRouter()


@routes.get("/metrics")
def metrics(request: Request) -> Response:
    """Answer in the format that the scraper asks for."""
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(request.app.state.metrics), media_type=content_type)


def collected(root: Path) -> CollectorRegistry:
    """Return a Prometheus registry that collects the metrics of the adapter registry at `root`."""
    registry = CollectorRegistry()
    registry.register(CentreCollector(root))
    return registry


def _each(read: Callable[[Mapping[str, Any]], float | None]) -> Callable[[Snapshot], Values]:
    """Return a reader of one value per adapter, for adapters that have it."""

    def values(snapshot: Snapshot) -> Values:
        found = {(name,): read(known) for name, known in snapshot["adapters"].items()}
        return {labels: value for labels, value in found.items() if value is not None}

    return values


def _parts(read: Callable[[Mapping[str, Any]], Mapping[str, float]]) -> Callable[[Snapshot], Values]:
    """Return a reader of one value per adapter and part."""
    return lambda snapshot: {
        (name, part): value for name, known in snapshot["adapters"].items() for part, value in read(known).items()
    }


def _last(read: Callable[[LastRound], Any]) -> Callable[[Mapping[str, Any]], Any]:
    return lambda known: read(known["last"])


_PREFIX = "umbel_federation_"
METRICS = (
    Metric(_PREFIX + "rounds_total", "counter", "Rounds that are over, by how they ended.",
           _parts(lambda known: known["rounds"]), ("adapter", "state")),
    Metric(_PREFIX + "rounds_open", "gauge", "Rounds that are under way.", _each(lambda known: known["open"]),
           ("adapter",)),
    Metric(_PREFIX + "live_version", "gauge", "Number of the version that the sites were last told to promote.",
           _each(lambda known: known["aliases"].get(LIVE)), ("adapter",)),
    Metric(_PREFIX + "head_version", "gauge", "Number of the version that training goes on from.",
           _each(lambda known: known["aliases"].get(HEAD)), ("adapter",)),
    Metric(_PREFIX + "last_round_ended_timestamp_seconds", "gauge", "When a round last ended.",
           _each(_last(lambda last: last.ended_at)), ("adapter",)),
    Metric(_PREFIX + "round_part_seconds", "gauge", "Where the time of the last round that ended went.",
           _parts(_last(lambda last: last.seconds)), ("adapter", "part")),
    Metric(_PREFIX + "round_sites", "gauge", "Sites in the last round's version, left out of it, and without anything "
           "worth training.",
           _parts(_last(lambda last: {
               "admitted": last.admitted, "left_out": last.left_out, "skipped": last.skipped})),
           ("adapter", "outcome")),
    Metric(_PREFIX + "site_last_admitted_timestamp_seconds", "gauge", "When a site was last part of a version.",
           _parts(_last(lambda last: last.admitted_at)), ("adapter", "site")),
    Metric(_PREFIX + "train_loss", "gauge", "Mean training loss per token (nats) of the last round's sites.",
           _each(_last(lambda last: last.train_loss)), ("adapter",)),
    Metric(_PREFIX + "heldout_loss", "gauge", "Mean held-out loss per token (nats) of the last round's probes.",
           _parts(_last(lambda last: last.heldout_loss)), ("adapter", "role")),
    Metric(_PREFIX + "events_total", "counter", "Lines of events.jsonl.",
           lambda snapshot: {(event,): count for event, count in snapshot["events"].items()}, ("event",)),
    Metric(_PREFIX + "registry_damages", "gauge", "Versions and alias logs that cannot be read, and foreign folders in "
           "a version's place; `umbel adapter verify` names them.", lambda snapshot: {ONE: snapshot["damages"]}),
    Metric(_PREFIX + "blob_bytes", "gauge", "Weights on this machine's disk; an object store counts its own.",
           lambda snapshot: {} if snapshot["blob_bytes"] is None else {ONE: snapshot["blob_bytes"]}),
)  # fmt: skip


class CentreCollector(Collector):
    """Collects the metrics of one registry. Each scrape opens the registry and reads only new events."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._events = EventTail(root / EVENTS)
        self._one_at_a_time = threading.Lock()  # each request has a thread of its own

    def collect(self) -> Iterator[Family]:
        with self._one_at_a_time, explained(self._root), closing(AdapterRegistry(self._root)) as registry:
            self._events.catch_up()
            snapshot = {
                "adapters": {name: self._adapter(registry, name) for name in registry.names()},
                "damages": len(registry.index.damaged())
                + sum(_aliases(registry, one) is None for one in registry.names()),
                "events": dict(self._events.counts),
                "blob_bytes": registry.blobs.bytes_here(),
            }
            yield from list(families(METRICS, snapshot, Totals()))

    def _adapter(self, registry: AdapterRegistry, name: str) -> dict[str, Any]:
        states = [record.state for record in registry.rounds.all(name)]
        return {
            "rounds": {state: states.count(state) for state in FINAL},
            "open": sum(not state.final for state in states),
            "aliases": _aliases(registry, name) or {},
            "last": self._events.last.get(name, LastRound()),
        }


def _aliases(registry: AdapterRegistry, name: str) -> dict[str, int] | None:
    """Return alias → number of its version; None where the alias log is damaged."""
    try:
        return {alias: ref.version for alias, ref in registry.aliases(name).items()}
    except RegistryError:
        return None
