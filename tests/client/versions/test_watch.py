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
from serving.traffic_report import TrafficReport, UserTraffic, VersionTraffic
from tests.toys.sites.journal import make_live
from umbel.adapter import AdapterRef
from umbel.messages import Decision, Verdict
from umbel.site.sections import ShadowSection

V1, V2 = (AdapterRef("support", version) for version in (1, 2))
POLICY = ShadowSection(rollback_window_s=600.0)
USERS = 40
"""Users whom the version answers; ten others stay with the one before, which fails none of them."""


def counted(requests: int, errors: int = 0) -> VersionTraffic:
    """Counts of the version, and `requests` or `errors` of each of its users."""
    by_user = {code: UserTraffic(requests=requests, errors=errors) for code in range(USERS)}
    return VersionTraffic(requests=USERS * requests, errors=USERS * errors, users=USERS, by_user=by_user)


class ToyEngine:
    """An engine whose router has counted something else each time it is asked, until it has told all its counts."""

    def __init__(self, *counted: VersionTraffic) -> None:
        self._counted = counted
        self.told = 0
        self.client = self

    async def traffic(self) -> TrafficReport:
        new = self._counted[min(self.told, len(self._counted) - 1)]
        self.told += 1
        each = UserTraffic(requests=new.requests // USERS)
        control = VersionTraffic(requests=10 * each.requests, by_user=dict.fromkeys(range(100, 110), each))
        return TrafficReport(versions={str(V2): new, str(V1): control})


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

    async def stand(ref: AdapterRef) -> None:
        journal.windows.end(ref)

    async def roll_back(name: str, instead_of: AdapterRef | None) -> None:
        calls.append((name, instead_of))
        journal.make_live(V1, "live again by roll-back")

    async def operator() -> None:
        for engine in engines:
            supervisor.engine = engine
            while engine.told <= len(engine._counted) and not calls:  # once more: then the last one has been compared
                await asyncio.sleep(0)
        if not calls:
            journal.make_live(V1, "live again by roll-back")

    async def main() -> None:
        promotion = Promotion(V2, V1, time.time(), already=already)
        journal.windows.begin(promotion)
        async with asyncio.timeout(20):
            switch: Any = SimpleNamespace(roll_back=roll_back, stand=stand)
            guard = asyncio.create_task(Watch(POLICY, journal, supervisor, switch).guard(promotion))
            await asyncio.sleep(0)
            await operator()
            supervisor.engine = None
            await guard
        assert journal.windows.open() == []

    asyncio.run(main())
    return calls


def test_what_it_failed_as_a_shadow_was_for_its_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    later = [counted(requests, errors=1) for requests in (1, 2, 4, 10)]
    assert rolled_back(tmp_path, monkeypatch, counted(1, errors=1), [ToyEngine(*later)]) == []


def test_what_it_fails_since_is_held_against_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    later = [counted(1 + failed, errors=failed) for failed in (0, 2, 4, 6)]
    engine = ToyEngine(*later)
    assert rolled_back(tmp_path, monkeypatch, counted(1), [engine]) == [("support", V2)]
    assert engine.told == 2, "as soon as there were enough to tell"


def test_another_run_of_the_engine_counts_from_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    already = counted(2)
    first, second = ToyEngine(already, already), ToyEngine(counted(2, errors=2))
    assert rolled_back(tmp_path, monkeypatch, already, [first, second]) == [("support", V2)]


@pytest.mark.parametrize("decision", ["promote", "keep", "reject"])
def test_users_can_reject_a_version_and_never_promote_one(decision: Decision) -> None:
    probe = Verdict(accepted=decision == "promote", decision=decision, reasons=("held-out loss",))
    liked = with_traffic(probe, Finding(worse=False, reasons=("rated better",)), ShadowSection())
    assert (liked.accepted, liked.decision) == (probe.accepted, decision)
    failed = with_traffic(probe, Finding(worse=True, reasons=("rated worse",)), ShadowSection())
    assert (failed.accepted, failed.decision) == (False, "reject")
