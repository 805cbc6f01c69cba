"""A site's metrics keep to Prometheus's conventions, come from one status per scrape, and never count backwards."""

import asyncio
import copy
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from client.journal import BY_ITSELF
from client.metrics import METRICS, Endpoint, SiteCollector
from scripts.tools.processes import free_port
from tests.toys.exposition import counters, lint, samples
from umbel.errors import ConfigError
from umbel.site.sections import MetricsSection

STATUS: dict[str, Any] = {
    "site": "clinic-a",
    "engine": {"ready": True, "starts": 1, "since": 1000.0, "url": "http://127.0.0.1:30000"},
    "aliases": {"support": {"live": "support@v2", "previous": None, "shadow": None}},
    "answering": {"support": {"since": 1500.0, "event": "promoted"}},
    "events": {
        "support": {
            "candidate": 3, "probing": 3, "live": 3, "retired": 2, "promoted": 2, "judged: promote": 2,
            "judged: keep": 1, "live again by roll-back": 1, "taken back: the base answers": 1, "put on trial": 1,
            f"{BY_ITSELF}worse than support@v1, errors": 1, f"{BY_ITSELF}worse than the base, ratings": 1,
        }
    },
    "in_flight": {"support@v2": 2, "base": 1},
    "rounds": {"done": 4, "failed": 1},
    "trained_tokens": 5000,
    "open_rounds": ["support/l-5-p"],
    "running_rounds": {"support": {"key": "l-5-p", "share": 0.25, "steps": 7, "num_loss_tokens": 600}},
    "training_shares": {"support": {"share": 2.0, "worth": 1.5}},
    "data": {
        "support": {
            "train": 90, "held_out": 10, "withheld": 4, "cut": 3, "dropped": 2, "untold": 0, "will_bite": [],
            "refused": "train.jsonl:7: not JSON", "rounds_wait": False,
        },
    },
    "training": {
        "job": "support/l-5-p", "state": "running", "frozen_tensors": 9,
        "quanta": {"mlp": {"count": 100, "seconds": 0.5, "longest_s": 0.01}},
        "longest_quantum_s": 0.004,
        "preemption": {"arrivals": 40, "count": 3},
        "slo": {
            "ttft_ms": 400.0, "ttft_ms_per_token": 0.5, "tpot_ms": 50.0, "quantile": 0.99, "margin_ttft": 0.1,
            "margin_tpot": 0.2, "debt_s": 1.5, "answered": 38, "met": 37,
        },
    },
}  # fmt: skip


class Site:
    """A site whose status a test sets, scraped as Prometheus does."""

    def __init__(self) -> None:
        self.status = copy.deepcopy(STATUS)
        self.registry = CollectorRegistry()
        self.registry.register(SiteCollector(lambda: self.status))

    def text(self) -> str:
        return generate_latest(self.registry).decode()


def test_the_linter_finds_what_is_wrong() -> None:
    bad = "# TYPE umbel_x_ms gauge\numbel_x_ms 1\n# HELP umbel_y_total y\n# TYPE umbel_y_total gauge\numbel_y_total 1\n"
    assert lint(bad) == ["umbel_x_ms: no help", "umbel_x_ms: not a base unit, or its type", "umbel_y_total: a gauge"]
    assert lint("# HELP umbel_z z\n# TYPE umbel_z gauge\n" + 2 * 'umbel_z{a="1"} 1\n')


def test_every_metric_is_there_once_and_by_the_conventions() -> None:
    site = Site()
    assert lint(site.text()) == []
    families = [line.split()[2] for line in site.text().splitlines() if line.startswith("# TYPE")]
    assert families == [metric.name for metric in METRICS]
    assert len(set(families)) == len(families)


def test_the_figures_are_those_of_the_status() -> None:
    seen = samples(Site().text())
    expected = {
        'umbel_live_version_info{adapter="support",version="support@v2"}': 1,
        'umbel_live_version_since_timestamp_seconds{adapter="support"}': 1500,
        'umbel_version_changes_total{adapter="support",event="promoted"}': 2,
        'umbel_version_changes_total{adapter="support",event="rolled_back"}': 2,
        'umbel_version_changes_total{adapter="support",event="rejected"}': 0,
        'umbel_version_changes_total{adapter="support",event="received"}': 3,
        'umbel_version_changes_total{adapter="support",event="put_on_trial"}': 1,
        'umbel_version_changes_total{adapter="support",event="rolled_back_by_itself"}': 2,
        'umbel_verdicts_total{adapter="support",decision="promote"}': 2,
        'umbel_verdicts_total{adapter="support",decision="keep"}': 1,
        'umbel_verdicts_total{adapter="support",decision="reject"}': 0,
        'umbel_examples{adapter="support",kind="train"}': 90,
        'umbel_examples{adapter="support",kind="held_out"}': 10,
        'umbel_examples{adapter="support",kind="withheld"}': 4,
        'umbel_examples{adapter="support",kind="cut"}': 3,
        'umbel_examples{adapter="support",kind="dropped"}': 2,
        'umbel_examples_refused{adapter="support"}': 1,
        "umbel_engine_up": 1,
        "umbel_engine_starts_total": 1,
        'umbel_requests_in_flight{version="support@v2"}': 2,
        "umbel_requests_total": 40,
        'umbel_slo_target_seconds{kind="ttft"}': 0.4,
        'umbel_slo_target_seconds{kind="ttft_per_token"}': 0.0005,
        'umbel_slo_target_seconds{kind="tpot"}': 0.05,
        'umbel_slo_requests_total{outcome="met"}': 37,
        'umbel_slo_requests_total{outcome="missed"}': 1,
        "umbel_slo_debt_seconds_total": 1.5,
        "umbel_cotrainer_up": 1,
        'umbel_training_share{adapter="support"}': 0.25,
        'umbel_round_tokens{adapter="support"}': 600,
        'umbel_adapter_share{adapter="support"}': 2,
        'umbel_adapter_worth{adapter="support"}': 1.5,
        "umbel_trained_tokens_total": 5000,
        "umbel_rounds_open": 1,
        'umbel_rounds_total{state="done"}': 4,
        'umbel_rounds_total{state="cancelled"}': 0,
        'umbel_quanta_total{kind="mlp"}': 100,
        'umbel_quanta_seconds_total{kind="mlp"}': 0.5,
        "umbel_quantum_p99_seconds": 0.004,
        "umbel_preemptions_total": 3,
    }
    assert {name: seen.get(name) for name in expected} == expected
    assert not any('event="live"' in name or "judged" in name for name in seen), "counted as promotions and verdicts"


def test_no_counter_goes_backwards_when_the_engine_is_started_anew() -> None:
    site = Site()
    before = counters(site.text())

    gone = {"training": None, "in_flight": {}, "running_rounds": {}}
    site.status |= {"engine": {**STATUS["engine"], "ready": False}, **gone}
    down = samples(site.text())
    assert counters(site.text()) == before, "what was counted stays there while no engine is"
    share = down['umbel_training_share{adapter="support"}']
    assert (down["umbel_engine_up"], down["umbel_cotrainer_up"], share) == (0, 0, 0)
    assert lint(site.text()) == []

    site.status["engine"] = {**STATUS["engine"], "starts": 2}
    training = copy.deepcopy(STATUS["training"])
    training["quanta"] = {"mlp": {"count": 150, "seconds": 0.1}, "attention": {"count": 2, "seconds": 0.01}}
    training["preemption"] = {"arrivals": 1, "count": 0}
    training["slo"] = None
    site.status["training"] = training
    after = counters(site.text())
    assert all(after[name] >= value for name, value in before.items())
    assert after['umbel_quanta_total{kind="mlp"}'] == 250, "also where the new engine is ahead of the old one already"
    assert after['umbel_quanta_total{kind="attention"}'] == 2
    assert after["umbel_requests_total"] == 41
    assert after['umbel_slo_requests_total{outcome="met"}'] == 37
    assert counters(site.text()) == after, "a scrape counts nothing itself"


def test_before_anything_happened_nothing_is_made_up() -> None:
    site = Site()
    site.status = {
        **STATUS, "engine": {"ready": False, "starts": 0, "since": None, "url": None}, "training": None,
        "aliases": {"support": {"live": None, "previous": None, "shadow": None}}, "events": {"support": {}},
        "answering": {"support": {"since": None, "event": None}}, "in_flight": {}, "rounds": {}, "open_rounds": [],
        "trained_tokens": 0,
    }  # fmt: skip
    seen = samples(site.text())
    assert seen['umbel_live_version_info{adapter="support",version="base"}'] == 1
    assert "umbel_requests_total" not in seen
    assert "umbel_quantum_p99_seconds" not in seen
    assert seen['umbel_version_changes_total{adapter="support",event="promoted"}'] == 0
    assert lint(site.text()) == []


def test_it_is_answered_over_http_from_the_daemons_loop() -> None:
    asked = []

    async def status() -> dict[str, Any]:
        asked.append(asyncio.get_running_loop())
        return STATUS

    async def main() -> None:
        section = MetricsSection(port=free_port())
        endpoint = Endpoint(section, status)
        assert endpoint.port == section.port
        async with httpx.AsyncClient(trust_env=False) as client:
            replies = await asyncio.gather(*(client.get(f"http://127.0.0.1:{section.port}/metrics") for _ in range(4)))
            for reply in replies:
                assert reply.status_code == 200
                assert reply.headers["content-type"].startswith("text/plain")
                assert lint(reply.text) == []
            assert asked == [asyncio.get_running_loop()] * 4, "one status for each scrape"
            with pytest.raises(
                ConfigError, match=rf"127.0.0.1:{section.port} cannot be used .* change \[metrics\].port"
            ):
                Endpoint(section, status)
            await endpoint.close()
            with pytest.raises(httpx.ConnectError):
                await client.get(f"http://127.0.0.1:{section.port}/metrics")

    asyncio.run(main())
