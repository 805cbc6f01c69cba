"""Promotions in a site's journal: remembered while they may be rolled back, at most one of each adapter."""

from pathlib import Path

import pytest

from client.journal import Journal
from client.rollback_windows import Promotion
from serving.traffic_report import UserTraffic, VersionTraffic
from tests.toys.sites.journal import V1, V2


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.sqlite3"


@pytest.fixture
def journal(path: Path) -> Journal:
    return Journal(path)


def test_a_promotion_is_remembered_as_long_as_it_is_compared(path: Path, journal: Journal) -> None:
    before = VersionTraffic(requests=7, errors=1, streams=2, users=1, by_user={4711: UserTraffic(requests=7)})
    first = Promotion(V1, None, 1.0)
    journal.windows.begin(first)
    assert Journal(path).windows.open() == [first]
    second = Promotion(V2, V1, 2.0, before, already=before)
    journal.windows.begin(second)
    assert Journal(path).windows.open() == [Promotion(V2, V1, 2.0)], "what an engine had counted dies with it"
    assert b"4711" not in path.with_name(f"{path.name}-wal").read_bytes() + path.read_bytes(), "and no users are in it"
    journal.windows.end(V1)
    assert len(journal.windows.open()) == 1, "only the last one of an adapter is compared"
    journal.windows.end(V2)
    assert journal.windows.open() == []
