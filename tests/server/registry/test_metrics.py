"""The centre's Prometheus metrics after a whole federation's rounds."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from fastapi.testclient import TestClient

from client import metrics as site_metrics
from scripts.tools.repository import REPOSITORY
from server.registry.api import registry_api
from server.registry.blobs import BlobStore
from server.registry.metrics import METRICS
from tests.toys.exposition import counters, lint, samples
from tests.toys.federation import World, a_world, poison
from tests.toys.registry import begun


@pytest.fixture
def world(tmp_path: Path, sockets: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with a_world(tmp_path / "registry", sockets, monkeypatch) as ready:
        yield ready


def federation(seen: dict[str, float], name: str, **labels: str) -> float | None:
    written = ",".join(f'{label}="{value}"' for label, value in sorted({"adapter": "support", **labels}.items()))
    return seen.get(f"umbel_federation_{name}{{{written}}}")


def test_a_federations_rounds_can_be_scraped(world: World) -> None:
    world.sites["b"].tokens = 300
    world.join_c().hurt = poison
    world.start()
    with TestClient(registry_api(world.root)) as client:
        reply = client.get("/metrics")
        again = client.get("/metrics").text
        openmetrics = client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert reply.headers["content-type"].startswith("text/plain; version=")
    assert openmetrics.headers["content-type"].startswith("application/openmetrics-text")
    assert openmetrics.text.endswith("# EOF\n")
    assert lint(reply.text) == []
    assert [line.split()[2] for line in reply.text.splitlines() if line.startswith("# TYPE")] == [
        metric.name for metric in METRICS
    ]
    seen = samples(reply.text)
    assert federation(seen, "rounds_total", state="promoted") == 2
    assert federation(seen, "rounds_total", state="failed") == 0
    assert federation(seen, "rounds_open") == 0
    assert federation(seen, "live_version") == federation(seen, "head_version") == 2
    assert federation(seen, "round_sites", outcome="admitted") == 2
    assert federation(seen, "round_sites", outcome="left_out") == 1
    assert federation(seen, "round_part_seconds", part="train") == 1.0
    assert federation(seen, "train_loss") == 2.5, "the same at each site, whatever their tokens"
    assert federation(seen, "heldout_loss", role="shadow") == 1.0
    published = next(event for event in reversed(world.events) if event["event"] == "round.published")
    assert federation(seen, "site_last_admitted_timestamp_seconds", site="a") == published["at"]
    assert federation(seen, "site_last_admitted_timestamp_seconds", site="c") is None
    assert federation(seen, "last_round_ended_timestamp_seconds") == world.events[-2]["at"]
    blobs = sum(file.stat().st_size for file in (world.root / "blobs").iterdir())
    assert seen["umbel_federation_blob_bytes"] == blobs > 0
    assert sum(value for name, value in seen.items() if "events_total" in name) == len(world.events)
    assert samples(again) == seen, "a scrape counts nothing itself"


def test_rounds_that_fail_are_told_and_counters_only_grow(world: World) -> None:
    world.start(rounds=1)
    with TestClient(registry_api(world.root)) as client:
        before = client.get("/metrics").text
        world.sites["b"].hurt = poison
        world.start("two", rounds=1)
        after = client.get("/metrics").text
    assert lint(after) == []
    assert all(counters(after)[name] >= value for name, value in counters(before).items())
    seen = samples(after)
    assert federation(seen, "rounds_total", state="failed") == 1
    assert federation(seen, "round_sites", outcome="admitted") == 0
    assert federation(seen, "round_sites", outcome="left_out") == 1
    assert federation(seen, "live_version") == 1


def test_a_registry_without_a_round_has_nothing_made_up(tmp_path: Path, world: World) -> None:
    begun(tmp_path / "r").close()
    with TestClient(registry_api(tmp_path / "r")) as client:
        text = client.get("/metrics").text
    assert lint(text) == []
    seen = samples(text)
    assert federation(seen, "head_version") == 0
    assert federation(seen, "live_version") is None
    assert federation(seen, "last_round_ended_timestamp_seconds") is None


def test_an_object_store_is_not_counted_here(tmp_path: Path) -> None:
    assert BlobStore("memory://weights").bytes_here() is None
    assert BlobStore(str(tmp_path / "none")).bytes_here() == 0


def test_the_alert_rules_in_the_manual_are_over_metrics_that_exist() -> None:
    manual = (REPOSITORY / "docs" / "how-to" / "scrape-metrics.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", manual, re.DOTALL)
    (group,) = yaml.safe_load(block)["groups"]
    known = {metric.name: metric.labels for metric in (*METRICS, *site_metrics.METRICS)}
    assert len(known) == len(METRICS) + len(site_metrics.METRICS), "site and centre share no name"
    assert len({rule["alert"] for rule in group["rules"]}) == 5
    for rule in group["rules"]:
        assert (
            {"alert", "expr", "labels", "annotations"}
            <= rule.keys()
            <= {"alert", "expr", "for", "labels", "annotations"}
        )
        asked = re.findall(r"umbel_\w+", rule["expr"])
        assert asked
        assert set(asked) <= known.keys(), rule["alert"]
        for name, label in re.findall(r"(umbel_\w+)\{(\w+)=", rule["expr"]):
            assert label in known[name], rule["alert"]
        shown = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"])) - {"instance"}
        assert all(shown <= set(known[name]) for name in asked[-1:]), rule["alert"]
