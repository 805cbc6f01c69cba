"""Conversations over Flower's Grid, with the real ClientApp and sites on real Unix sockets, without a clock."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from flwr.supercore.task_identity import TaskIdentity

from server import dialogues
from server.exchange import Exchange
from strategies.adapter import Update
from tests.toys.exchange import World, train, trained
from tests.toys.site import BASE, ToySite
from umbel.messages import Hello, RoundReport


@pytest.fixture
def world(sockets: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    for field in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, field, 1)
    with ExitStack() as stack:
        yield World(sockets, stack)


def test_all_sites_train_and_answer(world: World) -> None:
    world.gather()
    outcome = world.train()
    assert set(outcome.answers) == {"a", "b"}
    assert outcome.left_out == {}
    assert outcome.answers["a"].base == BASE.digest


@pytest.mark.parametrize("code", [3, 4, 5, 8])
@pytest.mark.parametrize("kind", ["train.submit", "query.collect"])
def test_what_flower_loses_is_sent_again(world: World, code: int, kind: str) -> None:
    world.gather()
    world.grid.errors[kind] = [code, code]
    assert set(world.train().answers) == {"a", "b"}
    assert len(world.a.orders) == 1


def test_a_clientapp_that_raises_leaves_its_site_out(world: World) -> None:
    world.gather()
    world.grid.errors["train.submit"] = [2]
    outcome = world.train()
    assert set(outcome.answers) == {"b"}
    assert outcome.left_out == {"a": "Flower error 2: injected"}


def test_a_message_that_vanished_is_sent_again_after_its_ttl(world: World) -> None:
    world.gather()
    world.grid.silent.add(11)
    world.clock.after(30, lambda: world.grid.silent.discard(11))
    start = world.clock()
    assert set(world.train().answers) == {"a", "b"}
    assert world.clock() - start >= 120


def test_a_site_that_never_answers_is_left_out_at_the_deadline(world: World) -> None:
    world.gather()
    world.grid.silent.add(12)
    outcome = world.train(seconds=50)
    assert set(outcome.answers) == {"a"}
    assert outcome.left_out["b"].startswith("no answer by the deadline")


def test_answers_that_are_enough_end_the_wait_and_who_is_late_is_said(world: World) -> None:
    world.gather()
    world.b.polls = 1000
    start = world.clock()
    outcome = world.train(enough=lambda answers: "a" in answers and world.clock() >= start + 40)
    assert 40 <= world.clock() - start < 41
    assert set(outcome.answers) == {"a"}
    assert outcome.late == {"b"}
    assert outcome.left_out["b"] == "no answer by the deadline"


def test_a_site_that_failed_is_not_late(world: World) -> None:
    world.gather()
    world.b.fail_with = (422, "AdapterError")
    outcome = world.train()
    assert outcome.late == set()
    assert set(outcome.left_out) == {"b"}


def test_a_dialogue_that_is_over_before_it_asks_leaves_its_site_out(world: World) -> None:
    def refuse(site: str, hello: Hello) -> dialogues.Dialogue[RoundReport, Update]:
        if site == "b":
            raise dialogues.SiteFailure("nothing for this site")
        return (yield from train(site, hello))

    world.gather()
    outcome = world.exchange.converse(refuse, world.clock() + 60, group="round 1")
    assert (set(outcome.answers), outcome.left_out) == ({"a"}, {"b": "nothing for this site"})


@pytest.mark.parametrize("downloads", [1, 3])
def test_updates_come_a_few_at_a_time_and_are_pulled_one_by_one(world: World, sockets: Path, downloads: int) -> None:
    names = [f"site-{number}" for number in range(7)]
    exchange = Exchange(world.grid, "support", clock=world.clock, sleep=world.clock.sleep, downloads=downloads)
    with ExitStack() as stack:
        world.grid.nodes.clear()
        for number, name in enumerate(names):
            world.grid.nodes[100 + number] = stack.enter_context(ToySite(name, sockets / f"{name}.sock")).socket
        assert exchange.gather(lambda sites: len(sites) == len(names), world.clock() + 60)
        outcome = exchange.converse(train, world.clock() + 300, group="round 1")
    assert sorted(outcome.answers) == names
    assert world.grid.most_adapters == downloads
    assert world.grid.most_adapters_pulled == 1


def test_a_site_that_is_not_ready_is_asked_until_it_is(world: World) -> None:
    world.gather()
    world.a.fail_with = (503, "EngineError")
    world.clock.after(20, lambda: setattr(world.a, "fail_with", None))
    assert set(world.train().answers) == {"a", "b"}


def test_the_reason_of_a_site_that_never_gets_ready_is_kept(world: World) -> None:
    world.gather()
    world.b.fail_with = (503, "EngineError")
    outcome = world.train(seconds=30)
    assert "EngineError" in outcome.left_out["b"]


def test_a_refusal_is_final(world: World) -> None:
    world.gather()
    world.b.fail_with = (422, "AdapterError")
    start = world.clock()
    assert "AdapterError" in world.train().left_out["b"]
    assert world.clock() - start < 30


def test_nonsense_leaves_only_its_site_out(world: World) -> None:
    world.gather()
    world.b.nonsense = True
    outcome = world.train()
    assert set(outcome.answers) == {"a"}
    assert "did not answer with a RoundReport" in outcome.left_out["b"]


def test_a_late_site_still_takes_part(world: World) -> None:
    late = world.grid.nodes.pop(12)
    world.gather(1)
    world.a.polls = 5
    world.clock.after(4, lambda: world.grid.nodes.update({12: late}))
    assert set(world.train().answers) == {"a", "b"}
    assert trained(world.b)


def test_too_few_sites_end_at_the_deadline(world: World) -> None:
    start = world.clock()
    assert not world.exchange.gather(lambda sites: len(sites) >= 3, world.clock() + 20)
    assert 20 <= world.clock() - start < 22
