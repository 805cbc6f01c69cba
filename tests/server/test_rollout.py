"""Promotion in waves: the order of the sites, reasons to stop, and continuing after a killed ServerApp."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from server.registry.registry import AdapterRegistry
from server.registry.round_log import RoundState
from server.waves import Waves
from tests.toys.federation import World, a_world, killed_after, states
from tests.toys.registry import v

WAVES = {"waves": "0.25,0.5,1", "wave-seconds": 100.0, "rounds": 1}
V1 = "support@v1"


@pytest.fixture
def world(tmp_path: Path, sockets: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with a_world(tmp_path / "registry", sockets, monkeypatch) as ready:
        ready.join("a", "b", "c", "d")
        yield ready


def in_order(world: World) -> list[str]:
    """The sites in the order in which v1 comes to them."""
    return [site for wave in Waves((1.0,)).of(world.sites, v(1)) for site in wave]


def promoted(world: World, ref: str = V1) -> list[str]:
    """The sites that were told to promote a version."""
    return sorted(name for name, site in world.sites.items() if ("POST", f"/adapters/{ref}/promote") in site.calls)


def test_each_wave_is_watched_before_the_next_and_told(world: World) -> None:
    began = world.clock()
    registry = world.start(**WAVES)
    assert states(registry) == [RoundState.PROMOTED]
    assert set(world.live.values()) == {V1}
    order = in_order(world)
    (plan,) = world.told("fleet.waves")
    assert plan["waves"] == [order[:1], order[1:2], order[2:]]
    waves = world.told("fleet.wave")
    assert [(one["wave"], one["sites"]) for one in waves] == [
        (1, order[:1]), (2, sorted(order[:2])), (3, sorted(order))
    ]  # fmt: skip
    assert world.clock() - began >= 300
    numbers = {site: index for index, site in enumerate(world.sites, start=1)}
    told = [node for node, kind in world.grid.pushed if kind == "query.promote"]
    assert told[:2] == [numbers[site] for site in order[:2]]
    assert sorted(told) == [1, 2, 3, 4]


def test_without_waves_all_are_promoted_at_once_and_nobody_is_asked(world: World) -> None:
    world.start(rounds=1)
    assert set(world.live.values()) == {V1}
    assert not world.told("fleet.waves") + world.told("fleet.wave")
    hellos = [site.calls.count(("GET", "/hello")) for site in world.sites.values()]
    assert hellos == [2] * 4, "when it came, and when the round was over"


def test_a_site_that_goes_back_by_itself_stops_the_version_and_takes_it_back_everywhere(world: World) -> None:
    first, second, *rest = in_order(world)

    def goes_back() -> None:
        if world.sites[second].live == V1:
            world.sites[second].roll_back()
        else:
            world.clock.after(10, goes_back)

    world.clock.after(10, goes_back)
    registry = world.start(**WAVES)
    record = registry.rounds.find("support", 1)
    assert record.state is RoundState.REJECTED
    assert "taken back: 1 of 2 sites it was promoted at went back from it by themselves" in record.reasons["*"]
    assert f"went back from {V1} by itself, to the base" in record.reasons[second]
    assert promoted(world) == sorted([first, second]), "the last wave never had it"
    assert set(world.live.values()) == {None}
    assert registry.aliases("support") == {"head": v(0)}
    assert all(world.sites[site].shadows[V1].state == "rejected" for site in rest)
    assert world.told("round.rejected")[0]["reasons"][second] in record.reasons[second]


def test_as_many_as_are_allowed_may_go_back(world: World) -> None:
    first = in_order(world)[0]

    def goes_back() -> None:
        if world.sites[first].live == V1:
            world.sites[first].roll_back()
        else:
            world.clock.after(10, goes_back)

    world.clock.after(10, goes_back)
    registry = world.start(**{**WAVES, "waves": "0.5,1", "wave-failures": 0.5})
    assert states(registry) == [RoundState.PROMOTED]
    assert registry.aliases("support")["live"] == v(1)
    assert world.live == {name: None if name == first else V1 for name in world.sites}
    assert "went back" in registry.rounds.find("support", 1).reasons[first]
    assert world.told("fleet.reconciled")[-1]["kept"].keys() == {first}, "and it is not brought there again"


def test_what_they_had_is_what_they_go_back_to(world: World) -> None:
    world.start(rounds=1)
    second = Waves((1.0,)).of(world.sites, v(2))[0][0]

    def goes_back() -> None:
        if world.sites[second].live == "support@v2":
            world.sites[second].roll_back()
        else:
            world.clock.after(10, goes_back)

    world.clock.after(10, goes_back)
    registry = world.start(run_id="two", **{**WAVES, "waves": "0.5,1"})
    assert states(registry) == [RoundState.PROMOTED, RoundState.REJECTED]
    assert set(world.live.values()) == {V1}
    assert registry.aliases("support") == {"head": v(1), "live": v(1)}


@pytest.mark.parametrize("call", range(3, 9))
def test_a_killed_serverapp_goes_on_with_the_wave_it_was_in(
    world: World, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    with killed_after(monkeypatch, lambda groups: len(groups) == call) as groups:
        world.start(**WAVES)
    assert groups[2:] == ([f"promote {V1}", f"watch {V1}"] * 3)[: call - 2]
    there = [name for name, live in world.live.items() if live == V1]
    assert sorted(in_order(world)[: len(there)]) == there
    began = world.clock()
    registry = world.start(**WAVES)
    assert states(registry) == [RoundState.PROMOTED]
    assert set(world.live.values()) == {V1}
    assert not world.told("fleet.reconciled"), "the round under way is what brings them there"
    waited = {1: 300, 2: 200, 4: 100}[len(there)]
    assert waited <= world.clock() - began < waited + 100, "a wave after which another had begun is not watched again"
    assert all(site.calls.count(("POST", "/adapters/support/rollback")) == 0 for site in world.sites.values())


def test_an_operators_roll_back_while_a_wave_is_watched_is_the_last_word(world: World) -> None:
    world.start(rounds=2)
    operator = AdapterRegistry(world.root)

    def says() -> None:
        if "support@v3" in world.live.values():
            operator.roll_back("support", who="eva", why="worse answers")
        else:
            world.clock.after(10, says)

    world.clock.after(10, says)
    began = world.clock()
    registry = world.start(run_id="two", **{**WAVES, "wave-seconds": 5000.0})
    assert world.clock() - began < 1000, "not at the end of the wave"
    assert states(registry) == [RoundState.PROMOTED, RoundState.PROMOTED, RoundState.REJECTED]
    told = "eva moved head from v2 to v1, live from v2 to v1 meanwhile: worse answers"
    assert told in registry.rounds.find("support", 3).reasons["*"]
    assert registry.aliases("support") == {"head": v(1), "live": v(1)}
    assert set(world.live.values()) == {V1}, "taken back to v2, and then to what the operator said"
    assert len(promoted(world, "support@v3")) == 1
