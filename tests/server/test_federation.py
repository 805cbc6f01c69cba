"""Whole rounds: from training to going live, failures on the way, and continuing after kill -9."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from server.exchange import Exchange
from server.registry.registry import AdapterRegistry
from server.registry.round_log import RoundState
from server.rollout import Rollout
from tests.toys.federation import Killed, World, a_world, killed_after, poison, states
from tests.toys.registry import v
from umbel import peft_dir
from umbel.messages import Decision


@pytest.fixture
def world(tmp_path: Path, sockets: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with a_world(tmp_path / "registry", sockets, monkeypatch) as ready:
        yield ready


def test_every_round_trains_from_head_and_goes_live(world: World) -> None:
    world.sites["b"].held = 30
    world.sites["b"].step = 1.5
    registry = world.start()
    assert states(registry) == [RoundState.PROMOTED] * 2
    assert registry.aliases("support") == {"head": v(2), "live": v(2)}
    assert [site.live for site in world.sites.values()] == ["support@v2", "support@v2", None]
    first, second = registry.read(v(1)), registry.read(v(2))
    assert second[1].parent == first[1].digest
    assert first[1].weights == {"a": 0.25, "b": 0.75}
    assert max(first[1].certificate.values()) < 1e-6
    start = peft_dir.factors(peft_dir.decode(registry.read(v(0))[0]))
    for module, (a, b) in peft_dir.factors(peft_dir.decode(first[0])).items():
        old_a, old_b = (factor.astype(np.float64) for factor in start[module])
        wanted = (old_b + 0.25 * 0.5 + 0.75 * 1.5) @ old_a
        assert np.allclose(b.astype(np.float64) @ a.astype(np.float64), wanted, atol=1e-6)


def test_events_tell_each_round_and_its_seconds(world: World) -> None:
    world.start()
    names = [event["event"] for event in world.events if event["event"] != "site.trained"]
    one_round = ["round.started", "round.trained", "round.published", "site.judged", "site.judged", "round.judged",
                 "round.promoted"]  # fmt: skip
    assert names == ["run.started", *one_round, *one_round, "run.finished"]
    done = [event for event in world.events if event["event"] == "round.promoted"]
    assert done[0]["messages"] == {"a": 8, "b": 8}
    assert set(done[0]["seconds"]) == {"train", "transfer", "aggregate", "load", "probe", "promote"}
    assert done[0]["seconds"]["train"] == 1.0
    trained = next(event for event in world.events if event["event"] == "site.trained")
    assert (trained["site"], trained["steps"], trained["round"]) == ("a", 4, 1)


def test_a_round_that_is_over_while_its_orders_are_held_costs_three_messages(world: World) -> None:
    for site in world.sites.values():
        site.polls = -1
    world.start(rounds=3)
    first, *others = [event["messages"] for event in world.told("round.promoted")]
    assert first == {"a": 4, "b": 4}, "with the hello of a new node"
    assert others == [{"a": 3, "b": 3}] * 2
    sent = [kind for node, kind in world.grid.pushed if node == 1]
    assert sent == ["query.hello", *["train.submit", "query.shadow", "query.promote"] * 3, "query.hello"]


def test_a_site_that_says_with_its_update_that_it_went_back_is_asked_before_the_next_round(world: World) -> None:
    for site in world.sites.values():
        site.polls = -1
    site = world.sites["b"]
    went_back = []

    def hurt(tensors: peft_dir.Tensors) -> peft_dir.Tensors:
        if site.live == "support@v1" and not went_back:
            went_back.append(site.roll_back())
            site.accepts = False
        return tensors

    site.hurt = hurt
    world.start(rounds=3, quorum=1)
    assert went_back
    assert world.told("fleet.reconciled")[0]["kept"]["b"].startswith("it has rejected support@v2")
    hellos = [node for node, kind in world.grid.pushed if kind == "query.hello"]
    assert hellos.count(1) == 2, "at the first and at the last look"
    assert hellos.count(2) == 3


def test_a_version_that_no_quorum_accepts_moves_nothing_and_says_why(world: World) -> None:
    world.sites["b"].accepts = False
    registry = world.start(rounds=1)
    record = registry.rounds.find("support", 1)
    assert record.state is RoundState.REJECTED
    assert record.reasons["*"] == "accepted by 1 of 2 sites, 2 needed"
    assert record.reasons["b"] == "rejected: held-out loss 1.00, live 1.20"
    assert registry.aliases("support") == {"head": v(0)}
    assert world.sites["a"].shadows["support@v1"].state == "rejected"


@pytest.mark.parametrize(("decision", "word"), [("reject", "rejected"), ("keep", "undecided")])
def test_a_site_that_votes_against_keeps_what_it_serves_and_is_named(
    world: World, decision: Decision, word: str
) -> None:
    world.start(rounds=1)
    site = world.join_c()
    site.accepts, site.otherwise, site.live = False, decision, "support@v1"
    registry = world.start(run_id="two", rounds=1)
    assert states(registry) == [RoundState.PROMOTED] * 2
    assert [world.sites[name].live for name in "abc"] == ["support@v2", "support@v2", "support@v1"]
    assert site.shadows["support@v2"].state == "rejected", "unloaded, now that the round is over"
    assert registry.rounds.find("support", 2).reasons["c"] == f"{word}: held-out loss 1.00, live 1.20"
    judged = next(event for event in world.events if event["event"] == "site.judged" and event["site"] == "c")
    assert (judged["verdict"]["accepted"], judged["verdict"]["decision"]) == (False, decision)


def test_one_poisoned_site_is_left_out_and_the_round_completes(world: World) -> None:
    world.join_c().hurt = poison
    registry = world.start(rounds=1)
    manifest = registry.versions("support")[1]
    assert set(manifest.weights) == {"a", "b"}
    assert "NaN" in manifest.left_out["c"]
    assert "NaN" in registry.rounds.find("support", 1).reasons["c"]


def test_a_round_without_a_quorum_of_updates_fails_and_the_next_one_runs(world: World) -> None:
    flaky = world.sites["b"]
    flaky.hurt = lambda tensors: poison(tensors) if len(flaky.orders) == 1 else tensors
    registry = world.start()
    assert states(registry) == [RoundState.FAILED, RoundState.PROMOTED]
    assert registry.rounds.find("support", 1).reasons["*"] == "1 of 2 updates needed were admitted"
    assert registry.rounds.find("support", 2).version == 1


def test_another_run_adds_its_rounds(world: World) -> None:
    world.start()
    registry = world.start(run_id="two", rounds=1)
    assert [record.run_id for record in registry.rounds.all("support")] == ["one", "one", "two"]
    assert registry.aliases("support")["live"] == v(3)
    again = world.start(run_id="two", rounds=1)
    assert len(again.rounds.all("support")) == 3


KILLED_AT = [
    (Exchange, "converse", 1),  # train
    (AdapterRegistry, "publish", 1),
    (Exchange, "converse", 2),  # shadow
    (Rollout, "promote", 1),
    (AdapterRegistry, "accept", 1),
    (Exchange, "converse", 4),  # train of the second round
]


@pytest.mark.parametrize(("cls", "method", "call"), KILLED_AT, ids=lambda value: getattr(value, "__name__", str(value)))
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_a_killed_serverapp_goes_on_with_the_round_in_flight(
    world: World, monkeypatch: pytest.MonkeyPatch, cls: type, method: str, call: int, before: bool
) -> None:
    calls, real = [], getattr(cls, method)

    def dying(*args: object, **kwargs: object) -> object:
        calls.append(method)
        if len(calls) == call and before:
            raise Killed
        result = real(*args, **kwargs)
        if len(calls) == call:
            raise Killed
        return result

    with monkeypatch.context() as patched:
        patched.setattr(cls, method, dying)
        with pytest.raises(Killed):
            world.start()
    registry = world.start()
    assert states(registry) == [RoundState.PROMOTED] * 2
    assert [manifest.version for manifest in registry.versions("support")] == [0, 1, 2]
    assert registry.aliases("support") == {"head": v(2), "live": v(2)}
    assert {world.sites[name].live for name in "ab"} == {"support@v2"}
    assert len(world.sites["a"].orders) == 2  # no round was trained twice


@pytest.mark.parametrize("call", [1, 2], ids=["in training", "before its verdict"])
def test_a_new_run_finishes_the_round_that_a_killed_one_left(
    world: World, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    with killed_after(monkeypatch, lambda groups: len(groups) == call):
        world.start(rounds=1)
    registry = world.start(run_id="two", rounds=1)
    # A round in training is the new run's own; a version without a verdict is judged before the new run's rounds.
    assert states(registry) == [RoundState.PROMOTED] * call
    assert len(world.sites["a"].orders) == call


def test_a_verdict_stands_even_if_a_site_changes_its_mind(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def dying(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Rollout, "promote", dying)
        with pytest.raises(Killed):
            world.start(rounds=1)
    del world.grid.nodes[2]
    world.clock.after(200, lambda: world.grid.nodes.update({2: world.sites["b"].socket}))
    registry = world.start(rounds=1)
    assert states(registry) == [RoundState.PROMOTED]


def test_a_round_whose_version_cannot_be_read_is_failed_and_the_next_one_runs(world: World) -> None:
    world.start(rounds=1)
    registry = AdapterRegistry(world.root)
    blob, manifest = registry.read(v(1))
    open_one = registry.publish("support", blob, round=2, run_id="one", parent=manifest.digest)
    assert open_one.ref == v(2)
    (registry.directory(v(2)) / "manifest.json").write_text("{")
    registry.close()
    registry = world.start(run_id="two", rounds=1)
    assert states(registry) == [RoundState.PROMOTED, RoundState.FAILED, RoundState.PROMOTED]
    reason = registry.rounds.find("support", 2).reasons["*"]
    assert reason.startswith("its version cannot be read: ")
    assert "v000002/manifest.json" in reason
    assert registry.aliases("support")["live"] == v(3)
