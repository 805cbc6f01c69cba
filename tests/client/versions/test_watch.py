"""A promoted version is judged by the requests it answered since its promotion, in any run of the engine."""

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from client.journal import Journal
from client.rollback_windows import Promotion
from client.versions import watch as watch_module
from client.versions.traffic_comparison import Finding
from client.versions.watch import Watch, with_traffic
from serving.traffic_report import TrafficReport, VersionTraffic
from tests.toys.sites.journal import make_live
from umbel.adapter import AdapterRef
from umbel.messages import Decision, Verdict
from umbel.site.sections import ShadowSection

V1, V2 = (AdapterRef("support", version) for version in (1, 2))
BEFORE = VersionTraffic(requests=200)
POLICY = ShadowSection(rollback_window_s=600.0)


class ToyEngine:
    """An engine whose router has counted something else each time it is asked."""

    def __init__(self, *counted: VersionTraffic) -> None:
        self._counted = list(counted)
        self.client = self

    async def traffic(self) -> TrafficReport:
        return TrafficReport(versions={str(V2): self._counted.pop(0)})


def rolled_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch, already: VersionTraffic, engines: list[ToyEngine]
) -> list[tuple[str, AdapterRef | None]]:
    """Guard a promotion until each engine has told all its counts, then let an operator roll back; return the calls."""
    monkeypatch.setattr(watch_module, "POLL_S", 0.0)
    journal = Journal(folder / "journal.sqlite3")
    make_live(journal, V1)
    make_live(journal, V2)
    supervisor: Any = SimpleNamespace(engine=engines[0])
    calls: list[tuple[str, AdapterRef | None]] = []

    async def roll_back(name: str, instead_of: AdapterRef | None) -> None:
        calls.append((name, instead_of))
        journal.make_live(V1, "live again by roll-back")

    async def operator() -> None:
        for engine in engines:
            supervisor.engine = engine
            while engine._counted and not calls:
                await asyncio.sleep(0)
        if not calls:
            journal.make_live(V1, "live again by roll-back")

    async def main() -> None:
        promotion = Promotion(V2, V1, time.time(), BEFORE, already)
        journal.windows.begin(promotion)
        async with asyncio.timeout(20):
            switch: Any = SimpleNamespace(roll_back=roll_back)
            guard = asyncio.create_task(Watch(POLICY, journal, supervisor, switch).guard(promotion))
            await asyncio.sleep(0)
            await operator()
            supervisor.engine = None
            await guard
        assert journal.windows.open() == []

    asyncio.run(main())
    return calls


def test_what_it_failed_as_a_shadow_was_for_its_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    already = VersionTraffic(requests=40, errors=40)
    later = [VersionTraffic(requests=requests, errors=40) for requests in (40, 48, 60, 100)]
    assert rolled_back(tmp_path, monkeypatch, already, [ToyEngine(*later)]) == []


def test_what_it_fails_since_is_held_against_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    already = VersionTraffic(requests=40)
    later = [VersionTraffic(requests=40 + failed, errors=failed) for failed in (0, 4, 8, 12)]
    engine = ToyEngine(*later)
    assert rolled_back(tmp_path, monkeypatch, already, [engine]) == [("support", V2)]
    assert len(engine._counted) == 1, "as soon as there were enough to tell"


def test_another_run_of_the_engine_counts_from_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    already = VersionTraffic(requests=16)
    first, second = ToyEngine(already, already), ToyEngine(VersionTraffic(requests=16, errors=16))
    assert rolled_back(tmp_path, monkeypatch, already, [first, second]) == [("support", V2)]


@pytest.mark.parametrize("decision", ["promote", "keep", "reject"])
def test_users_can_reject_a_version_and_never_promote_one(decision: Decision) -> None:
    probe = Verdict(accepted=decision == "promote", decision=decision, reasons=("held-out loss",))
    liked = with_traffic(probe, Finding(worse=False, reasons=("rated better",)))
    assert (liked.accepted, liked.decision) == (probe.accepted, decision)
    failed = with_traffic(probe, Finding(worse=True, reasons=("rated worse",)))
    assert (failed.accepted, failed.decision) == (False, "reject")
