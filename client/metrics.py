"""`Endpoint`: a site's metrics for Prometheus, their definitions and the HTTP server on `[metrics]`'s port."""

import asyncio
import re
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector

from client.journal import BY_ITSELF, LIVE_AGAIN, ROLLED_BACK, TAKEN_BACK
from umbel.errors import ConfigError
from umbel.metrics import ONE, Metric, Totals, Values, families
from umbel.site.sections import MetricsSection

SCRAPE_TIMEOUT_S = 8.0
"""Limit for one status, below the 10 s that Prometheus waits: a slow engine must not let threads pile up."""
JUDGED = "judged: "
"""Beginning of the journal's events about verdicts."""
CHANGES = {
    "candidate": "received",
    "probing": "loaded",
    "promoted": "promoted",
    LIVE_AGAIN: "rolled_back",
    TAKEN_BACK: "rolled_back",
    BY_ITSELF: "rolled_back_by_itself",
    "retired": "retired",
    "rejected": "rejected",
}
"""Event in the journal → value of the label `event`."""
NOT_COUNTED = {"live", ROLLED_BACK}
"""Events that the journal notes together with another event, which is counted in their place."""
ALWAYS_THERE = {"promoted": 0.0, "rolled_back": 0.0, "rejected": 0.0}
"""Events that are shown before they happened, because a rate needs a zero to begin from."""

Status = Mapping[str, Any]
"""The answer of GET /status."""


def _live(status: Status) -> Values:
    return {(name, aliases["live"] or "base"): 1.0 for name, aliases in status["aliases"].items()}


def _live_since(status: Status) -> Values:
    return {(name,): answering["since"] for name, answering in status["answering"].items() if answering["since"]}


def _changes(status: Status) -> Values:
    counts: Counter[tuple[str, ...]] = Counter()
    for adapter, events in status["events"].items():
        counts.update({(adapter, event): 0 for event in ALWAYS_THERE})
        for event, count in events.items():
            if event not in NOT_COUNTED and not event.startswith(JUDGED):
                event = BY_ITSELF if event.startswith(BY_ITSELF) else event  # each reason would be a label of its own
                counts[adapter, CHANGES.get(event) or re.sub(r"[^a-z0-9]+", "_", event.lower())] += count
    return dict(counts)


def _verdicts(status: Status) -> Values:
    return {
        (adapter, decision): events.get(JUDGED + decision, 0)
        for adapter, events in status["events"].items()
        for decision in ("promote", "keep", "reject")
    }


def _rounds(status: Status) -> Values:
    return {(state,): status["rounds"].get(state, 0) for state in ("done", "skipped", "failed", "cancelled")}


def _examples(status: Status) -> Values:
    kinds = ("train", "held_out", "withheld", "cut", "dropped")
    return {(adapter, kind): data[kind] for adapter, data in status["data"].items() for kind in kinds}


def _refused(status: Status) -> Values:
    return {(adapter,): float(bool(data["refused"])) for adapter, data in status["data"].items()}


def _training(status: Status) -> Mapping[str, Any]:
    """Return the co-trainer's status; empty while no engine answers."""
    return status["training"] or {}


def _running(field: str) -> Callable[[Status], Values]:
    """Return a reader of a field of each adapter's running round; it reads 0 where none runs."""

    def read(status: Status) -> Values:
        rounds, none = status["running_rounds"], {field: 0.0}
        return {(adapter,): float(rounds.get(adapter, none)[field]) for adapter in status["aliases"]}

    return read


def _shares(field: str) -> Callable[[Status], Values]:
    return lambda status: {(adapter,): shares[field] for adapter, shares in status["training_shares"].items()}


def _quanta(field: str) -> Callable[[Status], Values]:
    return lambda status: {(kind,): stats[field] for kind, stats in _training(status).get("quanta", {}).items()}


def _slo(read: Callable[[Mapping[str, Any]], Values]) -> Callable[[Status], Values]:
    """Return a reader of the latency targets; it reads nothing until there are targets."""
    return lambda status: read(slo) if (slo := _training(status).get("slo")) else {}


def _targets(slo: Mapping[str, Any]) -> Values:
    fields = {"ttft": "ttft_ms", "ttft_per_token": "ttft_ms_per_token", "tpot": "tpot_ms"}
    return {(kind,): slo[field] / 1000 for kind, field in fields.items()}


def _one(read: Callable[[Status], float | None]) -> Callable[[Status], Values]:
    return lambda status: {} if (value := read(status)) is None else {ONE: value}


METRICS = (
    # Versions
    Metric("umbel_live_version_info", "gauge", "1 for the version that answers users now.", _live,
           ("adapter", "version")),
    Metric("umbel_live_version_since_timestamp_seconds", "gauge", "Unix time since which this version answers.",
           _live_since, ("adapter",)),
    Metric("umbel_version_changes_total", "counter", "What happened to versions at this site, by the journal.",
           _changes, ("adapter", "event")),
    Metric("umbel_verdicts_total", "counter", "How shadows were judged here.", _verdicts, ("adapter", "decision")),
    # The data
    Metric("umbel_examples", "gauge", "Prepared examples: to train on, held out, withheld, cut at seq_len, "
           "left out.", _examples, ("adapter", "kind")),
    Metric("umbel_examples_refused", "gauge", "1 while changed files of examples cannot be used, and the data of "
           "before stays in use.", _refused, ("adapter",)),
    # The engine
    Metric("umbel_engine_up", "gauge", "1 while the engine answers users.",
           _one(lambda status: float(status["engine"]["ready"]))),
    Metric("umbel_engine_starts_total", "counter", "Engines that became ready since the daemon began.",
           _one(lambda status: status["engine"]["starts"])),
    Metric("umbel_requests_in_flight", "gauge", "Requests that are being answered, by version.",
           lambda status: {(version,): count for version, count in status["in_flight"].items()}, ("version",)),
    Metric("umbel_requests_total", "counter", "Requests that came to the engine's scheduler.",
           _one(lambda status: _training(status).get("preemption", {}).get("arrivals")), restarts=True),
    # Latency targets
    Metric("umbel_slo_target_seconds", "gauge", "Targets in force: to the first token, more of it per prompt token, "
           "and per later token.", _slo(_targets), ("kind",)),
    Metric("umbel_slo_margin_ratio", "gauge", "The part of a target that the governor keeps back.",
           _slo(lambda slo: {("ttft",): slo["margin_ttft"], ("tpot",): slo["margin_tpot"]}), ("kind",)),
    Metric("umbel_slo_objective_ratio", "gauge", "The share of requests that must meet both targets.",
           _slo(lambda slo: {ONE: slo["quantile"]})),
    Metric("umbel_slo_requests_total", "counter", "Answered requests, by whether they met both targets.",
           _slo(lambda slo: {("met",): slo["met"], ("missed",): slo["answered"] - slo["met"]}), ("outcome",),
           restarts=True),
    Metric("umbel_slo_debt_seconds_total", "counter", "Training that share_floor ran against the targets.",
           _slo(lambda slo: {ONE: slo["debt_s"]}), restarts=True),
    # Training
    Metric("umbel_cotrainer_up", "gauge", "1 while the engine has a co-trainer that can train.",
           _one(lambda status: float(bool(_training(status).get("frozen_tensors"))))),
    Metric("umbel_training_share", "gauge", "Share of the time that the running round got since it began.",
           _running("share"), ("adapter",)),
    Metric("umbel_training_steps", "gauge", "Optimizer steps of the running round.", _running("steps"), ("adapter",)),
    Metric("umbel_round_tokens", "gauge", "Tokens with a loss that the running round has trained on.",
           _running("num_loss_tokens"), ("adapter",)),
    Metric("umbel_adapter_share", "gauge", "The configured part of the training, in proportion to the others'.",
           _shares("share"), ("adapter",)),
    Metric("umbel_adapter_worth", "gauge", "The factor on that part for what the adapter's rounds have brought.",
           _shares("worth"), ("adapter",)),
    Metric("umbel_trained_tokens_total", "counter", "Tokens with a loss, in all rounds that are over.",
           _one(lambda status: status["trained_tokens"])),
    Metric("umbel_rounds_open", "gauge", "Rounds that wait or run.", _one(lambda status: len(status["open_rounds"]))),
    Metric("umbel_rounds_total", "counter", "Rounds that are over, by how they ended.", _rounds, ("state",)),
    Metric("umbel_quanta_total", "counter", "Pieces of training that ran between iterations.", _quanta("count"),
           ("kind",), restarts=True),
    Metric("umbel_quanta_seconds_total", "counter", "The time they took.", _quanta("seconds"), ("kind",),
           restarts=True),
    Metric("umbel_quantum_p99_seconds", "gauge", "The largest P99 of any kind of quantum: what serving may wait.",
           _one(lambda status: _training(status).get("longest_quantum_s"))),
    Metric("umbel_preemptions_total", "counter", "Times that training made way for a request that arrived.",
           _one(lambda status: _training(status).get("preemption", {}).get("count")), restarts=True),
)  # fmt: skip


class SiteCollector(Collector):
    """Makes the metrics from one status per scrape."""

    def __init__(self, status: Callable[[], Status]) -> None:
        self._status = status
        self._totals = Totals()
        self._one_at_a_time = threading.Lock()  # each scrape has a thread of its own

    def collect(self) -> Iterator[Family]:
        """Yield every metric family; called by prometheus_client at each scrape."""
        with self._one_at_a_time:
            status = self._status()
            if status["engine"]["ready"]:
                self._totals.begin(status["engine"]["starts"])
            yield from list(families(METRICS, status, self._totals))


class Endpoint:
    """Answers GET /metrics in threads of its own; the status comes from the daemon's event loop.

    Raises ConfigError where the address cannot be used.

    >>> endpoint = Endpoint(config.metrics, site.status)  # within the event loop
    >>> await endpoint.close()
    """

    def __init__(self, section: MetricsSection, status: Callable[[], Coroutine[Any, Any, dict[str, Any]]]) -> None:
        loop = asyncio.get_running_loop()
        registry = CollectorRegistry()
        registry.register(
            SiteCollector(lambda: asyncio.run_coroutine_threadsafe(status(), loop).result(SCRAPE_TIMEOUT_S))
        )
        try:
            self._server, _ = start_http_server(section.port, section.host, registry)
        except OSError as error:
            raise ConfigError(
                f"[metrics]: {section.host}:{section.port} cannot be used ({error.strerror}); stop what listens there "
                "or change [metrics].port"
            ) from error

    @property
    def port(self) -> int:
        """The port on which the server listens."""
        return int(self._server.server_port)

    async def close(self) -> None:
        """Stop listening."""
        await asyncio.to_thread(self._server.shutdown)
        self._server.server_close()
