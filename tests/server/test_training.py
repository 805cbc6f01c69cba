"""The training of a round: ranks that differ, updates that come late, and memory that does not grow with the sites."""

import gc
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from server.registry import run_lock
from server.registry.round_log import RoundState
from strategies.adapter import Update
from strategies.fold import RoundFold
from tests.toys.federation import World, a_world, poison, states
from tests.toys.registry import v
from tests.toys.site import ToySite
from umbel import peft_dir

NEVER = 10**6


@pytest.fixture
def world(tmp_path: Path, sockets: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with a_world(tmp_path / "registry", sockets, monkeypatch) as ready:
        ready.join_c()
        yield ready


def a_product(blob: bytes) -> dict[str, np.ndarray]:
    """Module → ΔW."""
    pairs = peft_dir.factors(peft_dir.decode(blob)).items()
    return {module: b.astype(np.float64) @ a.astype(np.float64) for module, (a, b) in pairs}


def late(world: World, *, until: float, name: str = "c") -> ToySite:
    """Make a site train until `until` seconds from now; it judges as fast as the others."""
    site = world.sites[name]
    site.polls, site.shadow_polls = NEVER, 1
    world.clock.after(until, lambda: setattr(site, "polls", 0))
    return site


def test_a_site_of_smaller_rank_trains_and_serves_the_best_it_can_hold(world: World) -> None:
    small = world.sites["b"]
    small.max_lora_rank = 1
    registry = world.start()
    assert states(registry) == [RoundState.PROMOTED] * 2
    first, second = registry.read(v(1))[1], registry.read(v(2))[1]
    assert set(first.weights) == set(second.weights) == {"a", "b", "c"}
    assert [order.plan.rank for order in small.orders.values()] == [1, 1]
    assert [order.plan.rank for order in world.sites["a"].orders.values()] == [2, 2]
    assert {name: site.live for name, site in world.sites.items()} == dict.fromkeys("abc", "support@v2")
    shown = small.manifests["support@v2"]
    assert (shown.rank, shown.truncation_of) == (1, second.digest)
    assert shown.digest != second.digest
    whole = world.sites["a"].manifests["support@v2"]
    assert (whole.rank, whole.truncation_of, whole.digest) == (2, None, second.digest)
    assert whole.site_metrics == whole.counts == shown.counts == {}, "what a site measured is for the centre only"
    assert second.site_metrics["b"]["rank"] == 1


def test_what_a_small_site_changed_is_added_to_what_it_never_saw(world: World) -> None:
    """Delta form: G' = G + Σ p_i (ΔW_i − G_i), where G_i is what site i received (raFLoRA, arXiv 2602.13486)."""
    world.start(rounds=1)
    for site in world.sites.values():
        site.step = 0.01
    small = world.sites["b"]
    small.max_lora_rank, small.step = 1, 0.5
    registry = world.start(run_id="two", rounds=1, **{"norm-clip": 1e9})
    before, after = a_product(registry.read(v(1))[0]), a_product(registry.read(v(2))[0])
    expected = dict(before)
    for site in world.sites.values():
        for module, (a, b) in peft_dir.factors(peft_dir.decode(site.parent(2))).items():
            changed = np.full(b.shape, site.step) @ a.astype(np.float64)
            expected[module] = expected[module] + changed / 3
    for module, wanted in expected.items():
        assert np.allclose(after[module], wanted, atol=1e-5)
        assert not np.allclose(after[module], before[module], atol=0.05)


@pytest.mark.parametrize("strategy", ["fedit", "ffa"])
def test_a_mean_of_factors_admits_no_smaller_rank(world: World, strategy: str) -> None:
    world.sites["b"].max_lora_rank = 1
    registry = world.start(rounds=1, strategy=strategy)
    manifest = registry.versions("support")[1]
    assert set(manifest.weights) == {"a", "c"}
    assert "serves adapters up to rank 1, this run needs 2" in manifest.left_out["b"]
    assert not world.sites["b"].orders


def test_a_late_update_is_dropped_and_named(world: World) -> None:
    site = late(world, until=120)
    registry = world.start()
    first, second = registry.versions("support")[1:]
    assert first.left_out == {"c": "no answer by the deadline; its late update is dropped"}
    assert set(first.weights) == {"a", "b"}
    assert set(second.weights) == {"a", "b", "c"}, "it is given the next round like everyone"
    assert second.parents == (first.digest,)
    assert len(site.orders) == 2


def test_the_others_have_their_training_time_and_the_stragglers_seconds_then_the_round_is_over(world: World) -> None:
    late(world, until=NEVER)
    start = world.clock()
    world.start(rounds=1)
    (trained,) = [event for event in world.events if event["event"] == "round.trained"]
    assert 80 <= trained["at"] - start < 85  # round-seconds + straggler-seconds


def test_a_quorum_is_waited_for_longer(world: World) -> None:
    late(world, until=100)
    registry = world.start(rounds=1, quorum=3)
    assert states(registry) == [RoundState.PROMOTED]
    assert set(registry.versions("support")[1].weights) == {"a", "b", "c"}


def test_a_buffered_update_counts_for_less_in_the_next_round(world: World) -> None:
    """FedBuff's 1/√(1 + staleness) (arXiv 2106.06639)."""
    site = late(world, until=110)
    world.sites["a"].polls = world.sites["b"].polls = 10
    registry = world.start(rounds=3, buffered=True)
    first, second, third = registry.versions("support")[1:]
    assert first.left_out == {"c": "no answer by the deadline; its late update counts in the next round"}
    share = 1 / math.sqrt(2)
    assert second.weights == pytest.approx({"a": 1 / (2 + share), "b": 1 / (2 + share), "c": share / (2 + share)})
    assert second.parents == (first.digest, registry.versions("support")[0].digest)
    assert second.left_out == {}
    assert (second.site_metrics["c"]["staleness"], second.site_metrics["a"]["staleness"]) == (1, 0)
    assert sorted(order.round for order in site.orders.values()) == [1, 3], "no new round before the old one is in"
    assert third.weights == pytest.approx(dict.fromkeys("abc", 1 / 3))
    assert third.parents == (second.digest,)


def test_an_update_is_not_stale_if_the_version_between_was_rejected(world: World) -> None:
    late(world, until=110)
    for name in "ab":
        world.sites[name].polls, world.sites[name].shadow_polls, world.sites[name].accepts = 10, 1, False
    world.clock.after(100, lambda: [setattr(site, "accepts", True) for site in world.sites.values()])
    registry = world.start(buffered=True)
    assert states(registry) == [RoundState.REJECTED, RoundState.PROMOTED]
    second = registry.versions("support")[2]
    assert second.weights == pytest.approx(dict.fromkeys("abc", 1 / 3))
    assert second.parents == (registry.versions("support")[0].digest,)


def test_an_update_that_is_too_late_by_far_is_given_up(world: World) -> None:
    site = late(world, until=NEVER)
    registry = world.start(rounds=5, buffered=True)
    assert states(registry) == [RoundState.PROMOTED] * 5
    assert sorted(order.round for order in site.orders.values()) == [1, 4]


def test_a_late_site_that_is_away_for_a_round_is_still_waited_for(world: World) -> None:
    site = late(world, until=110)
    socket = world.grid.nodes[3]
    for name in "ab":
        world.sites[name].polls, world.sites[name].shadow_polls = 10, 1  # a round takes about 35 s, a verdict 5
    world.clock.after(82, lambda: world.grid.nodes.pop(3))
    world.clock.after(142, lambda: world.grid.nodes.update({3: socket}))
    registry = world.start(rounds=3, buffered=True)
    second, third = registry.versions("support")[2:]
    assert second.left_out == {"c": "its SuperNode is offline; its late update counts in the next round"}
    assert third.site_metrics["c"]["staleness"] == 2
    assert sorted(order.round for order in site.orders.values()) == [1]


def test_a_late_update_that_is_spoilt_is_left_out_with_the_reason(world: World) -> None:
    site = late(world, until=110)
    site.hurt = poison
    registry = world.start(buffered=True)
    second = registry.versions("support")[2]
    assert "NaN" in second.left_out["c"]
    assert set(second.weights) == {"a", "b"}


def test_a_site_that_comes_once_an_update_is_in_waits_for_the_next_round(world: World) -> None:
    """How long a change may be depends on how many sites may answer, and the first update is measured by it."""
    socket = world.grid.nodes.pop(3)
    world.sites["b"].polls = 10
    world.clock.after(12, lambda: world.grid.nodes.update({3: socket}))
    first, second = world.start().versions("support")[1:]
    assert set(first.weights) == {"a", "b"}
    assert first.left_out["c"] == "it came when the round had an update already; the next one asks it"
    assert set(second.weights) == {"a", "b", "c"}


def test_an_update_that_is_refused_keeps_nobody_out(world: World) -> None:
    """Or one site, by answering at once with nonsense, would hold up all that are not there yet."""
    socket = world.grid.nodes.pop(3)
    world.sites["a"].hurt, world.sites["b"].polls = poison, 10
    world.clock.after(12, lambda: world.grid.nodes.update({3: socket}))
    first = world.start(rounds=1).versions("support")[1]
    assert set(first.weights) == {"b", "c"}
    assert "NaN" in first.left_out["a"]


def test_a_site_that_comes_before_the_first_update_takes_part(world: World) -> None:
    socket = world.grid.nodes.pop(3)
    world.sites["a"].polls = world.sites["b"].polls = 10
    world.clock.after(6, lambda: world.grid.nodes.update({3: socket}))
    assert set(world.start(rounds=1).versions("support")[1].weights) == {"a", "b", "c"}


def test_a_busy_site_weighs_as_much_as_one_that_did_all_its_steps(world: World) -> None:
    world.sites["c"].steps = 1
    version = world.start(rounds=1).versions("support")[1]
    assert version.weights["b"] == pytest.approx(1 / 3)
    assert (version.counts["c"]["steps"], version.counts["b"]["held-examples"]) == (1, 10)


def test_a_verdict_is_not_waited_for_once_a_quorum_has_accepted(world: World) -> None:
    world.sites["c"].shadow_polls = NEVER
    registry = world.start(rounds=1)
    assert states(registry) == [RoundState.PROMOTED]
    published, judged = (
        next(event["at"] for event in world.events if event["event"] == name)
        for name in ("round.published", "round.judged")
    )
    assert 20 <= judged - published < 25  # straggler-seconds
    assert registry.rounds.find("support", 1).reasons["c"] == "no answer by the deadline"
    assert world.sites["c"].live is None


def test_no_more_than_one_update_is_held_and_the_spool_is_left_empty(
    world: World, sockets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    real = RoundFold.add

    def add(self: RoundFold, update: Update, staleness: int = 0) -> None:
        real(self, update, staleness)
        held.append(sum(type(thing) is Update for thing in gc.get_objects()))

    monkeypatch.setattr(RoundFold, "add", add)
    spool = run_lock.folder(world.root, "support") / "spool"
    spool.mkdir(parents=True)
    (spool / "left by a killed process").touch()
    for number in range(9):
        name = f"more-{number}"
        world.sites[name] = ToySite(name, sockets / f"{name}.sock")
        world.enter(world.sites[name])
        world.grid.nodes[10 + number] = world.sites[name].socket
    registry = world.start(rounds=1, robust="geometric_median")
    assert len(registry.versions("support")[1].weights) == 12
    assert held == [1] * 12
    assert not spool.exists()
