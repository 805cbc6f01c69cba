"""A site's own loop that dies at any fault point of a round goes on with the round in flight."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.registry import retention
from server.registry.registry import AdapterRegistry
from server.registry.round_log import RoundState
from tests.toys.alone import AloneAt
from tests.toys.fault_points import CENTRE
from tests.toys.registry import v
from tests.toys.rehearsal import Rehearsals
from tests.toys.site import ToySite

pytestmark = pytest.mark.slow

ACCEPTED = [die_at for die_at in CENTRE if not die_at.startswith(("gc.", "discard."))]
DISCARDED = [die_at for die_at in CENTRE if die_at.startswith("discard.")]


@pytest.fixture(scope="module")
def rehearsals() -> Iterator[Rehearsals]:
    with Rehearsals("tests.toys.alone") as ready:
        yield ready


@pytest.fixture
def site(sockets: Path) -> Iterator[ToySite]:
    with ToySite("a", sockets / "a.sock", polls=-1) as running:
        yield running


@pytest.mark.parametrize("die_at", ACCEPTED)
def test_it_goes_on_as_if_it_had_not_died(tmp_path: Path, site: ToySite, rehearsals: Rehearsals, die_at: str) -> None:
    root = tmp_path / "registry"
    assert rehearsals.run(die_at, root, site.socket) == -signal.SIGKILL, f"{die_at} was never reached"
    done = sum(record.state.final for record in _rounds(root))
    AloneAt(root, site.socket).start("two", rounds=max(1, 2 - done))
    registry = AdapterRegistry(root)
    rounds = registry.rounds.all("support")
    assert [(record.round, record.state) for record in rounds] == [
        (number, RoundState.PROMOTED) for number in range(1, len(rounds) + 1)
    ]
    assert len(site.orders) == len(rounds), "no round was trained twice"
    last = len(rounds)
    assert registry.aliases("support") == {"head": v(last), "live": v(last)}
    assert site.live == f"support@v{last}"
    assert retention.plan(registry) == retention.Garbage((), (), ()), "nothing is left over"
    registry.close()


@pytest.mark.parametrize("die_at", DISCARDED)
def test_a_rejected_round_stays_rejected(tmp_path: Path, site: ToySite, rehearsals: Rehearsals, die_at: str) -> None:
    root = tmp_path / "registry"
    site.accepts = False
    assert rehearsals.run(die_at, root, site.socket) == -signal.SIGKILL, f"{die_at} was never reached"
    before = len(_rounds(root))
    site.accepts = True
    AloneAt(root, site.socket).start("two", rounds=1)
    states = [record.state for record in _rounds(root)]
    assert states == [RoundState.REJECTED] * before + [RoundState.PROMOTED]


def _rounds(root: Path) -> list:
    registry = AdapterRegistry(root)
    found = registry.rounds.all("support")
    registry.close()
    return found
