"""A centre that dies at any fault point goes on with the round in flight; sites and registry end as if it never had."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.registry import retention
from server.registry.registry import AdapterRegistry
from server.registry.round_log import RoundState
from tests.toys.centre_life import SITES, collect
from tests.toys.fault_points import CENTRE, V3
from tests.toys.federation import World, a_world
from tests.toys.registry import begun, grow
from tests.toys.rehearsal import Rehearsals
from umbel.adapter import AdapterRef

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rehearsals() -> Iterator[Rehearsals]:
    with Rehearsals("tests.toys.centre_life") as ready:
        yield ready


@pytest.fixture
def world(tmp_path: Path, sockets: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with a_world(tmp_path / "registry", sockets, monkeypatch) as ready:
        yield ready


GC = [die_at for die_at in CENTRE if die_at.startswith("gc.")]
DISCARD = [die_at for die_at in CENTRE if die_at.startswith("discard.")]
ACCEPT = [die_at for die_at in CENTRE if die_at not in (*GC, *DISCARD)]


@pytest.mark.parametrize("die_at", ACCEPT)
def test_a_serverapp_that_dies_at_any_point_goes_on_as_if_it_had_not(
    world: World, sockets: Path, rehearsals: Rehearsals, die_at: str
) -> None:
    assert rehearsals.run(die_at, "federation", world.root, sockets) == -signal.SIGKILL, f"{die_at} was never reached"
    whole(world.root, CENTRE[die_at])
    registry = world.start()
    whole(world.root, "support@v2")
    assert ends(registry) == [(1, RoundState.PROMOTED, 1), (2, RoundState.PROMOTED, 2)]
    assert registry.aliases("support") == dict.fromkeys(("head", "live"), AdapterRef("support", 2))
    assert [world.sites[name].live for name in SITES] == ["support@v2"] * 2
    assert len(registry.moves("support")) == 3, "each move was made once: to v0, v1, v2"
    assert [len(world.sites[name].orders) for name in SITES] == [2, 2], "no round was trained twice"
    assert retention.plan(registry) == retention.Garbage((), (), ()), "nothing is left over"


@pytest.mark.parametrize("die_at", DISCARD)
def test_a_rejected_round_stays_rejected_wherever_the_serverapp_dies(
    world: World, sockets: Path, rehearsals: Rehearsals, die_at: str
) -> None:
    world.sites["b"].accepts = False
    assert rehearsals.run(die_at, "federation", world.root, sockets) == -signal.SIGKILL
    whole(world.root, CENTRE[die_at])
    world.sites["b"].accepts = True
    judged = {"1"} if ":2" not in die_at else {"1", "2"}
    registry = world.start()
    found = ends(registry)
    assert [state for number, state, _ in found if str(number) in judged] == [RoundState.REJECTED] * len(judged)
    assert [world.sites[name].live for name in SITES] == [None if len(judged) == 2 else "support@v2"] * 2
    whole(world.root, None if len(judged) == 2 else "support@v2")


@pytest.mark.parametrize("die_at", GC)
def test_a_gc_that_dies_at_any_point_removed_nothing_that_is_needed_and_is_taken_up(
    tmp_path: Path, rehearsals: Rehearsals, die_at: str
) -> None:
    died, undisturbed = tmp_path / "died", tmp_path / "undisturbed"
    for root in (died, undisturbed):
        registry = begun(root)
        grow(registry, "aaar")
        registry.close()
    collect(undisturbed)
    assert rehearsals.run(die_at, "gc", died, tmp_path) == -signal.SIGKILL
    whole(died, CENTRE[die_at])
    collect(died)
    assert whole(died, V3) == whole(undisturbed, V3)
    assert len(list((died / "blobs").iterdir())) == 2, "live, and what was live before"


def ends(registry: AdapterRegistry) -> list[tuple[int, RoundState, int | None]]:
    return [(record.round, record.state, record.version) for record in registry.rounds.all("support")]


def whole(root: Path, live: str | None) -> dict[str, list[str]]:
    """Check every version, listed or indexed again from the files, byte by byte; return version → its files."""
    registry = AdapterRegistry(root)
    versions = registry.versions("support")
    assert [registry.verify(manifest.ref) for manifest in versions] == [[] for _ in versions]
    pointers = registry.aliases("support")
    assert str(pointers.get("live") or None) == str(live)
    for ref in pointers.values():
        assert registry.read(ref)[1] in versions
    listed = [manifest.model_dump() for manifest in versions]
    registry.reindex()
    assert [manifest.model_dump() for manifest in registry.versions("support")] == listed, "the index follows the files"
    registry.close()
    return {str(m.ref): sorted(path.name for path in registry.directory(m.ref).iterdir()) for m in versions}
