"""The fleet follows the registry: roll-back, catch-up, and sites that refuse a version."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from server.registry.registry import AdapterRegistry
from server.registry.round_log import RoundState
from server.rollout import Rollout
from tests.toys.federation import Killed, World, a_world, killed_after, states
from tests.toys.registry import v
from tests.toys.site import ToySite
from umbel.errors import NotFound

SHADOW = ("POST", "/adapters/support/shadow")
RESTORE = ("POST", "/adapters/support/restore")


@pytest.fixture
def world(tmp_path: Path, sockets: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with a_world(tmp_path / "registry", sockets, monkeypatch) as ready:
        yield ready


def reconcile(world: World, run_id: str = "two", **settings: object) -> dict:
    """Start a run without rounds; return its event `fleet.reconciled`."""
    world.start(run_id=run_id, rounds=0, **settings)
    assert [event["event"] for event in world.events[-3:]] == ["run.started", "fleet.reconciled", "run.finished"]
    return world.events[-2]


def fresh(world: World) -> None:
    """Forget what the sites were asked so far."""
    for site in world.sites.values():
        site.calls.clear()


def roll_back(world: World) -> None:
    AdapterRegistry(world.root).roll_back("support", who="eva", why="worse answers")


def test_a_roll_back_reaches_every_site_without_weights_and_twice_comes_back(world: World) -> None:
    world.join("c")
    world.start(rounds=2)
    for number, (live, before) in enumerate((("support@v1", "support@v2"), ("support@v2", "support@v1"))):
        roll_back(world)
        fresh(world)
        told = reconcile(world, f"back {number}")
        assert told["brought"] == dict.fromkeys("abc", before)
        assert (told["live"], told["kept"], told["missed"]) == (live, {}, {})
        assert set(world.live.values()) == {live}
        for site in world.sites.values():
            assert site.calls.count(RESTORE) == 1
            assert SHADOW not in site.calls
    fresh(world)
    assert reconcile(world, "nothing to do")["brought"] == {}
    assert all(site.calls == [("GET", "/hello")] for site in world.sites.values()), "the hello with which a run begins"


def test_the_first_version_is_rolled_back_to_the_base(world: World) -> None:
    registry = AdapterRegistry(world.root, create=True)
    with pytest.raises(NotFound):
        registry.roll_back("support", who="eva", why="nothing was live")
    world.start(rounds=1)
    roll_back(world)
    assert reconcile(world)["brought"] == {"a": "support@v1", "b": "support@v1"}
    assert registry.aliases("support") == {"head": v(0), "live": v(0)}
    assert world.live == {"a": None, "b": None, "c": None}
    roll_back(world)
    assert reconcile(world, "again")["brought"] == {"a": "base", "b": "base"}
    assert world.live == {"a": "support@v1", "b": "support@v1", "c": None}


def test_a_site_that_was_away_catches_up_once_it_is_back(world: World) -> None:
    world.start(rounds=1)
    site = world.join_c()
    world.start(run_id="two", rounds=1)
    first = next(event for event in world.events if event["event"] == "fleet.reconciled")
    assert first["brought"] == {"c": "base"}, "before it trains"
    assert first["live"] == "support@v1"
    assert [event["event"] for event in world.events].index("fleet.reconciled") > 0
    assert site.calls.count(SHADOW) == 2, "v1, and then v2 of the round"
    assert world.live == dict.fromkeys("abc", "support@v2")


def test_a_site_that_was_away_only_at_the_promotion_needs_no_weights(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.join("c")
    real = Rollout.promote

    def promote(*args: object, **kwargs: object) -> object:
        world.leave("c")
        return real(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(Rollout, "promote", promote)
        registry = world.start(rounds=1)
    assert "accepted, but not promoted" in registry.rounds.find("support", 1).reasons["c"]
    assert world.live == {"a": "support@v1", "b": "support@v1", "c": None}
    world.join("c")
    assert reconcile(world)["brought"] == {"c": "base"}
    assert (world.live["c"], world.sites["c"].calls.count(SHADOW)) == ("support@v1", 1)


def test_a_site_that_went_back_by_itself_is_left_alone_and_named_once(world: World) -> None:
    world.join("c")
    world.start(rounds=2)
    site = world.sites["c"]
    site.roll_back()
    site.accepts = False
    fresh(world)
    registry = world.start(run_id="two", rounds=1)
    assert states(registry)[-1] is RoundState.PROMOTED
    assert site.live == "support@v1"
    assert RESTORE not in site.calls
    told = world.told("fleet.reconciled")
    assert [one["kept"]["c"] for one in told] == [
        f"it has rejected {ref}, or went back from it by itself" for ref in ("support@v2", "support@v3")
    ]
    assert world.live == {"a": "support@v3", "b": "support@v3", "c": "support@v1"}


def test_weights_that_a_site_has_no_more_are_sent_again_and_not_judged_again(world: World) -> None:
    world.start(rounds=2)
    site = world.sites["a"]
    site.gone.add("support@v1")
    site.accepts = False
    roll_back(world)
    fresh(world)
    assert reconcile(world)["brought"] == {"a": "support@v2", "b": "support@v2"}
    assert [site.calls.count(SHADOW) for site in world.sites.values()] == [1, 0, 0]
    assert set(world.live.values()) - {None} == {"support@v1"}


@pytest.mark.parametrize("polls", [0, 3])
def test_a_site_that_never_had_a_version_judges_it_and_may_be_against_it(world: World, polls: int) -> None:
    world.start(rounds=1)
    site = world.join_c()
    site.accepts, site.shadow_polls = False, polls
    told = reconcile(world)
    assert told["kept"] == {"c": "Conflict: /adapters/support/restore?ref=support%40v1: no"}
    assert (site.live, site.shadows["support@v1"].state) == (None, "rejected"), "and it does not stay loaded"
    fresh(world)
    told = reconcile(world, "again")
    assert told["kept"]["c"].startswith("it has rejected support@v1")
    assert site.calls == [("GET", "/hello")]


def test_a_site_that_does_not_answer_is_missed_and_tried_again(world: World) -> None:
    world.join("c")
    world.start(rounds=2)
    roll_back(world)
    site = world.sites["c"]
    world.clock.after(1.5, lambda: setattr(site, "fail_with", (503, "EngineError")))
    told = reconcile(world)
    assert set(told["missed"]) == {"c"}
    assert "EngineError" in told["missed"]["c"]
    assert (world.live["a"], site.live) == ("support@v1", "support@v2")
    site.fail_with = None
    assert reconcile(world, "again")["brought"] == {"c": "support@v2"}


def judging(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    after(Rollout, "shadow", world, monkeypatch)


def publishing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    after(AdapterRegistry, "publish", world, monkeypatch)


def promoting(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    after(Rollout, "promote", world, monkeypatch)


def after(cls: type, method: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator rolls back just after that step."""
    real = getattr(cls, method)

    def step(*args: object, **kwargs: object) -> object:
        result = real(*args, **kwargs)
        roll_back(world)
        monkeypatch.setattr(cls, method, real)
        return result

    monkeypatch.setattr(cls, method, step)


@pytest.mark.parametrize("when", [publishing, judging, promoting], ids=lambda step: step.__name__)
def test_an_operators_roll_back_is_never_promoted_over(
    world: World, monkeypatch: pytest.MonkeyPatch, when: Callable[[World, pytest.MonkeyPatch], None]
) -> None:
    world.start(rounds=2)
    when(world, monkeypatch)
    registry = world.start(run_id="two", rounds=1)
    record = registry.rounds.find("support", 3)
    assert record.state is RoundState.REJECTED
    assert "eva moved head from v2 to v1, live from v2 to v1 meanwhile: worse answers" in record.reasons["*"]
    assert registry.aliases("support") == {"head": v(1), "live": v(1)}
    assert world.live == {"a": "support@v1", "b": "support@v1", "c": None}
    assert len([move for move in registry.moves("support") if "live" in move.to]) == 3
    asked = sum(site.calls.count(SHADOW) for site in world.sites.values())
    assert asked == (4 if when is publishing else 6), "nobody is asked about what will not be promoted"
    registry = world.start(run_id="three", rounds=1)
    assert registry.aliases("support") == {"head": v(4), "live": v(4)}, "and the next round goes on from there"
    assert registry.versions("support")[4].parent == registry.versions("support")[1].digest


def test_a_roll_back_that_was_taken_back_is_none(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.start(rounds=2)
    after(AdapterRegistry, "publish", world, monkeypatch)
    after(Rollout, "shadow", world, monkeypatch)
    with monkeypatch.context() as patched:
        patched.setattr(AdapterRegistry, "overruled", lambda *_: "")
        patched.setattr(Rollout, "promote", lambda *_, **__: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            world.start(run_id="two", rounds=1)
    registry = world.start(run_id="two", rounds=1)
    assert registry.aliases("support") == {"head": v(3), "live": v(3)}


def test_a_run_without_rounds_leaves_rounds_alone_and_needs_no_matching_plan(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.start(rounds=1)
    with killed_after(monkeypatch, lambda groups: groups[-1].startswith("round")):
        world.start(run_id="two", rounds=1)
    assert reconcile(world, "three", rank=16, steps=99)["brought"] == {}
    registry = world.start(run_id="four", rounds=1)
    assert states(registry) == [RoundState.PROMOTED] * 2
    assert all(len(world.sites[name].orders) == 2 for name in "ab"), "the round was taken over, not trained again"


def test_an_adapter_that_was_never_promoted_has_nothing_to_follow(world: World) -> None:
    world.sites["a"].live = "support@v7"
    world.start(rounds=0)
    assert [event["event"] for event in world.events] == ["run.started", "run.finished"]
    assert world.sites["a"].live == "support@v7"
    assert all(site.calls == [] for site in world.sites.values())


def test_a_site_of_smaller_rank_gets_as_much_of_it_as_it_can_serve(world: World) -> None:
    world.start(rounds=1)
    site: ToySite = world.join_c()
    site.max_lora_rank = 1
    assert reconcile(world)["brought"] == {"c": "base"}
    manifest = site.manifests["support@v1"]
    assert (manifest.rank, manifest.truncation_of) == (1, AdapterRegistry(world.root).versions("support")[1].digest)
