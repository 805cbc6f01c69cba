"""The roster: a site is known by its name, whatever its SuperNode's id, and takes part once it is admitted."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from flwr.supercore.task_identity import TaskIdentity

from server import dialogues
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
