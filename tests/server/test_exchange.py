"""Conversations over Flower's Grid, with the real ClientApp and sites on real Unix sockets, without a clock."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest
from flwr.supercore.task_identity import TaskIdentity

from server import dialogues
from server.exchange import Exchange, Outcome
from strategies.base import Update
from tests.toys.grid import Clock, ToyGrid
from tests.toys.site import BASE, ToySite
from umbel import peft_dir
from umbel.messages import Hello, RoundOrder, RoundReport, Submit, TrainPlan

PLAN = TrainPlan(rank=2, steps=3, seconds=10.0)
PARENT = peft_dir.encode({})
ORDER = RoundOrder(key="l-1-p", base=BASE.digest, parent=peft_dir.digest(PARENT), round=1, plan=PLAN)


class World:
    """Two sites, their SuperNodes 11 and 12, and an exchange that talks to them."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.clock = Clock()
        self.a = stack.enter_context(ToySite("a", folder / "a.sock"))
        self.b = stack.enter_context(ToySite("b", folder / "b.sock"))
        self.grid = ToyGrid(self.clock, {11: self.a.socket, 12: self.b.socket})
        self.exchange = Exchange(self.grid, clock=self.clock, sleep=self.clock.sleep)

    def gather(self, count: int = 2) -> None:
        assert self.exchange.gather(lambda sites: len(sites) >= count, self.clock() + 60)

    def train(
        self, seconds: float = 300.0, enough: Callable[[Mapping[str, Update]], bool] = lambda answers: False
    ) -> Outcome[Update]:
        return self.exchange.converse(train, self.clock() + seconds, group="round 1", enough=enough)


def train(hello: Hello) -> dialogues.Dialogue[RoundReport, Update]:
    """Give a site the round, and fetch its update."""
    yield from dialogues.submit(Submit(adapter="support", order=ORDER), PARENT)
    return (yield from dialogues.collect(hello.site, hello.fingerprint.digest, "support", ORDER))


@pytest.fixture
def world(sockets: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    for field in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, field, 1)
    with ExitStack() as stack:
        yield World(sockets, stack)


def trained(site: ToySite) -> bool:
    return ("GET", f"/adapters/support/rounds/{ORDER.key}/update") in site.calls


def test_all_sites_train_and_answer(world: World) -> None:
    world.gather()
    outcome = world.train()
    assert set(outcome.answers) == {"a", "b"}
    assert outcome.left_out == {}
    assert outcome.answers["a"].base == BASE.digest


def test_a_site_is_not_asked_more_often_than_every_two_seconds(world: World) -> None:
    world.a.polls = world.b.polls = 10
    world.grid.latency = 0.0
    world.gather()
    start = world.clock()
    world.train()
    assert world.clock() - start >= 20


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
    def refuse(hello: Hello) -> dialogues.Dialogue[RoundReport, Update]:
        if hello.site == "b":
            raise dialogues.SiteFailure("nothing for this site")
        return (yield from train(hello))

    world.gather()
    outcome = world.exchange.converse(refuse, world.clock() + 60, group="round 1")
    assert (set(outcome.answers), outcome.left_out) == ({"a"}, {"b": "nothing for this site"})


@pytest.mark.parametrize("downloads", [1, 3])
def test_updates_come_a_few_at_a_time_and_are_pulled_one_by_one(world: World, sockets: Path, downloads: int) -> None:
    names = [f"site-{number}" for number in range(7)]
    exchange = Exchange(world.grid, clock=world.clock, sleep=world.clock.sleep, downloads=downloads)
    with ExitStack() as stack:
        world.grid.nodes.clear()
        for number, name in enumerate(names):
            world.grid.nodes[100 + number] = stack.enter_context(ToySite(name, sockets / f"{name}.sock")).socket
        assert exchange.gather(lambda sites: len(sites) == len(names), world.clock() + 60)
        outcome = exchange.converse(train, world.clock() + 300, group="round 1")
    assert sorted(outcome.answers) == names
    assert world.grid.most_adapters == downloads
    assert world.grid.most_adapters_pulled == 1


def test_asking_how_a_round_stands_brings_no_adapter(world: World) -> None:
    world.gather()
    world.a.polls = 5
    world.train()
    fetched = ("GET", f"/adapters/support/rounds/{ORDER.key}/update")
    assert world.a.calls.count(fetched) == world.b.calls.count(fetched) == 1


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


def test_too_few_sites_end_at_the_deadline(world: World) -> None:
    start = world.clock()
    assert not world.exchange.gather(lambda sites: len(sites) >= 3, world.clock() + 20)
    assert 20 <= world.clock() - start < 22
