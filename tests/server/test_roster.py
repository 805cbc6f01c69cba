"""The roster: a site is known by its name, whatever its SuperNode's id, and takes part once it is admitted."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from flwr.supercore.task_identity import TaskIdentity

from server import dialogues
from server.keyring import Keyring
from tests.toys.exchange import World
from tests.toys.site import ToySite
from umbel.messages import Hello


@pytest.fixture
def world(sockets: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    for field in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, field, 1)
    with ExitStack() as stack:
        yield World(sockets, stack)


def test_a_restarted_supernode_is_found_again_under_its_new_id(world: World) -> None:
    world.gather()
    world.grid.silent.add(11)

    def restart() -> None:
        del world.grid.nodes[11]
        world.grid.nodes[99] = world.a.socket

    world.clock.after(5, restart)
    start = world.clock()
    assert set(world.train().answers) == {"a", "b"}
    assert world.clock() - start < 60
    assert (99, "query.hello") in world.grid.pushed


def test_a_second_node_with_a_sites_name_waits_until_the_first_is_gone(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.gather()
    world.grid.nodes[13] = world.a.socket
    world.gather(2)
    world.train()
    assert "node 13 says it is site a, which node 11 is already" in caplog.text
    assert world.exchange.roster.node_of("a") == 11
    del world.grid.nodes[11]
    world.clock.sleep(2)
    world.train()
    assert world.exchange.roster.node_of("a") == 13


def test_a_daemon_that_starts_late_is_found(world: World, sockets: Path) -> None:
    world.grid.nodes[14] = sockets / "c.sock"
    world.gather(2)
    assert "is `umbel serve` running?" in world.exchange.roster.troubles["node 14"]
    with ToySite("c", sockets / "c.sock"):
        world.gather(3)
    assert world.exchange.roster.troubles == {}


def test_a_site_that_is_not_admitted_is_not_asked_but_may_mend(world: World) -> None:
    def only_a(hello: Hello) -> None:
        if hello.max_lora_rank < 8:
            raise dialogues.SiteFailure("rank")

    world.b.max_lora_rank = 4
    world.exchange.roster.require(only_a)
    world.gather(1)
    assert set(world.train().answers) == {"a"}
    assert world.exchange.roster.troubles == {"b": "rank"}
    world.b.max_lora_rank = 16
    world.gather(2)


def only_known(hello: Hello) -> None:
    if hello.site not in ("a", "b", "mallory"):
        raise dialogues.SiteFailure(f"{hello.site} has no key here")


def reconnect(world: World, node: int, site: ToySite) -> None:
    """The node goes offline, is seen to be, and comes back."""
    del world.grid.nodes[node]
    world.exchange.gather(lambda sites: False, world.clock() + 5)
    world.grid.nodes[node] = site.socket


def test_one_node_never_has_more_than_one_name(world: World, sockets: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It says one name after the other while it is refused: it collects none of them, and has to reconnect."""
    world.exchange.roster.require(only_known)
    with ToySite("ghost-1", sockets / "m.sock") as mallory:
        world.grid.nodes[9] = mallory.socket
        world.gather(2)
        assert world.exchange.roster.troubles == {"ghost-1": "ghost-1 has no key here"}
        for name in ("ghost-2", "ghost-3", "mallory", "ghost-1"):
            mallory.name = name
            world.exchange.gather(lambda sites: len(sites) > 2, world.clock() + 40)
        assert set(world.exchange.roster.sites) == {"a", "b"}
        assert world.grid.pushed.count((9, "query.hello")) == 2, "once it has changed its name it is asked no more"
        why = world.exchange.roster.troubles["ghost-1"]
        assert "it said that it is site ghost-1, and then ghost-2; a SuperNode has one name until it reconnects" in why
        assert "stop its `umbel supernode` for a minute and start it again" in why
        assert f"node 9 does not take part: {why}" in caplog.text
        mallory.name = "mallory"
        reconnect(world, 9, mallory)
        world.gather(3)
        assert set(world.train().answers) == {"a", "b", "mallory"}
        assert world.exchange.roster.troubles == {}


def test_a_site_that_is_renamed_under_its_supernode_takes_part_again_when_that_has_reconnected(world: World) -> None:
    world.gather()
    world.b.name = "c"
    asked = world.exchange.converse(
        lambda site, _: dialogues.hello(site, "support", Keyring(None)), world.clock() + 30, group="reconcile"
    )
    assert (set(asked.answers), asked.left_out) == ({"a"}, {"b": "its SuperNode says now that it is site 'c', not b"})
    assert set(world.exchange.roster.sites) == {"a"}
    assert "it said that it is site b, and then c" in world.exchange.roster.troubles["b"]
    assert set(world.train().answers) == {"a"}
    reconnect(world, 12, world.b)
    world.gather(2)
    assert set(world.train().answers) == {"a", "c"}


def test_a_refused_node_does_not_keep_its_name_from_another_one(world: World, sockets: Path) -> None:
    """Whoever says a site's name and is refused is not in the way of that site."""

    def large(hello: Hello) -> None:
        if hello.max_lora_rank < 8:
            raise dialogues.SiteFailure("rank")

    world.exchange.roster.require(large)
    with ToySite("c", sockets / "c.sock") as first, ToySite("c", sockets / "c2.sock") as second:
        first.max_lora_rank = 4
        world.grid.nodes[21] = first.socket
        world.gather(2)
        assert world.exchange.roster.troubles == {"c": "rank"}
        world.grid.nodes[22] = second.socket
        world.gather(3)
        assert world.exchange.roster.node_of("c") == 22
        assert world.exchange.roster.troubles == {"node 21": "rank"}
        assert {site: hello.site for site, hello in world.exchange.roster.sites.items()} == {s: s for s in "abc"}
        first.max_lora_rank = 16
        world.exchange.gather(lambda sites: False, world.clock() + 60)
        assert world.exchange.roster.node_of("c") == 22, "it waits for its turn"
        assert set(world.train().answers) == {"a", "b", "c"}
        assert (first.orders, len(second.orders)) == ({}, 1)


def test_a_node_that_is_refused_later_loses_its_name(world: World) -> None:
    world.gather()

    def only_a(hello: Hello) -> None:
        if hello.site != "a":
            raise dialogues.SiteFailure("another base than the first quorum's")

    world.exchange.roster.require(only_a)
    assert set(world.exchange.roster.sites) == {"a"}
    assert world.exchange.roster.node_of("b") is None
    assert set(world.train().answers) == {"a"}
