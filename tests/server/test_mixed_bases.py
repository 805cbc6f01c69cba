"""Sites in 4 and in 16 bits in one run: apart by default, together with `mixed-bases` where their bases are kin."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.registry.registry import AdapterRegistry
from server.registry.round_log import RoundState
from tests.toys.federation import World, a_world, killed_after, states
from tests.toys.registry import v
from tests.toys.site import BASE
from umbel.peft_dir import MANIFEST

DENSE, KIN = BASE, "1" * 64
PACKED = BASE.model_copy(update={"weights": "packed", "quantization": "nf4"})
MIXED = {"mixed-bases": True}
V1 = "support@v1"


def pack(world: World, name: str, kin: str = KIN) -> None:
    """Have a site hold the packed base."""
    site = world.sites[name]
    site.base, site.kin, site.packing = PACKED, kin, "nf4"


@pytest.fixture
def world(tmp_path: Path, sockets: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Sites a and, not yet online, c with the dense base; b with the packed one."""
    with a_world(tmp_path / "registry", sockets, monkeypatch) as ready:
        for site in ready.sites.values():
            site.kin = KIN
        pack(ready, "b")
        yield ready


def test_by_default_they_are_apart_and_the_reason_says_how_to_train_them_together(world: World) -> None:
    registry = world.start(rounds=1)
    assert states(registry) == [RoundState.FAILED]
    reason = registry.rounds.find("support", 1).reasons["b"]
    assert reason.startswith("site b holds another base than site a: weights, quantization differ; they are kin: ")
    assert "mixed-bases=true" in reason
    world.join("c")
    registry = world.start("two", rounds=1)
    left_out = registry.versions("support")[1].left_out["b"]
    assert "than this registry: weights, quantization differ; they are kin: run with mixed-bases=true" in left_out
    assert not world.sites["b"].orders
    assert registry.pin("support").fingerprint == DENSE


def test_with_mixed_bases_they_train_judge_and_serve_together(world: World) -> None:
    registry = world.start(rounds=2, **MIXED)
    assert states(registry) == [RoundState.PROMOTED] * 2
    assert world.live == {"a": "support@v2", "b": "support@v2", "c": None}
    for name in "ab":
        assert {(order.base, order.kin) for order in world.sites[name].orders.values()} == {(DENSE.digest, KIN)}
        assert {one.kin for one in world.sites[name].manifests.values()} == {KIN}
    for manifest in registry.versions("support")[1:]:
        assert (manifest.base, manifest.kin, manifest.left_out) == (DENSE.digest, KIN, {})
        assert manifest.bases == pytest.approx({"bfloat16": 0.5, "nf4": 0.5})


@pytest.mark.parametrize("packed", ["a", "b"])
def test_the_pin_is_that_of_the_dense_site_of_a_quorum(world: World, packed: str) -> None:
    for name, site in world.sites.items():
        site.base, site.packing = (PACKED, "nf4") if name == packed else (DENSE, "")
    pin = world.start(rounds=1, **MIXED).pin("support")
    assert (pin.fingerprint, pin.kin) == (DENSE, KIN)


def test_without_a_dense_site_the_pin_is_the_first_ones_and_a_dense_one_joins(world: World) -> None:
    pack(world, "a")
    registry = world.start(rounds=1, **MIXED)
    assert (registry.pin("support").fingerprint, registry.pin("support").kin) == (PACKED, KIN)
    assert registry.versions("support")[1].bases == pytest.approx({"nf4": 1.0})
    world.join("c")
    registry = world.start("two", rounds=1, **MIXED)
    second = registry.versions("support")[2]
    assert second.base == PACKED.digest
    assert second.bases == pytest.approx({"bfloat16": 1 / 3, "nf4": 2 / 3})
    assert set(world.live.values()) == {"support@v2"}


def test_an_existing_registry_is_opened_to_kin_and_brings_them_what_is_live(world: World) -> None:
    world.join("c")
    world.leave("b")
    registry = world.start(rounds=1)
    assert registry.versions("support")[1].kin == ""
    received = world.sites["a"].manifests[V1]
    world.join("b")
    world.start("two", rounds=0)
    assert world.live == {"a": V1, "b": None, "c": V1}, "not opted in"
    world.start("three", rounds=0, **MIXED)
    assert set(world.live.values()) == {V1}
    assert world.sites["b"].manifests[V1].kin == KIN
    assert world.sites["a"].manifests[V1] == received, "it is not sent again"
    registry = world.start("four", rounds=1, **MIXED)
    assert set(registry.versions("support")[2].weights) == {"a", "b", "c"}
    world.start("five", rounds=1)
    assert world.live == {"a": "support@v3", "b": "support@v2", "c": "support@v3"}, "and closed again"


def test_a_pin_of_an_earlier_release_is_read_and_refuses_who_is_kin_to_nothing_it_knows(world: World) -> None:
    world.join("c")
    world.leave("b")
    world.start(rounds=1)
    path = world.root / "support" / "pin.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "kin"}))
    world.join("b")
    registry = world.start("two", rounds=1, **MIXED)
    assert registry.pin("support").kin == ""
    second = registry.versions("support")[2]
    assert set(second.weights) == {"a", "c"}
    assert "weights, quantization differ; copy the same" in second.left_out["b"]


@pytest.mark.parametrize(
    ("kin", "reason"),
    [
        ("2" * 64, "weights, quantization differ; copy the same model directory to both"),
        ("", "weights, quantization differ; it is packed, and says no origin that is trusted there: copy origin.json"),
    ],
    ids=["another origin", "no origin"],
)
def test_who_is_not_kin_is_left_out_of_a_mixed_run(world: World, kin: str, reason: str) -> None:
    world.join("c")
    pack(world, "b", kin)
    first = world.start(rounds=1, **MIXED).versions("support")[1]
    assert set(first.weights) == {"a", "c"}
    assert reason in first.left_out["b"]
    assert not world.sites["b"].orders
    assert not world.sites["b"].shadows


def test_a_run_without_it_says_nothing_of_kin(world: World) -> None:
    world.join("c")
    world.leave("b")
    registry = world.start(rounds=1)
    assert {order.kin for order in world.sites["a"].orders.values()} == {""}
    written = json.loads((registry.directory(v(1)) / MANIFEST).read_text())
    assert not {"kin", "bases"} & written.keys()


def test_a_buffered_update_of_a_packed_site_counts_by_its_kind(world: World) -> None:
    world.join("c")
    late = world.sites["b"]
    late.polls, late.shadow_polls = 10**6, 1
    world.sites["a"].polls = world.sites["c"].polls = 10
    world.clock.after(110, lambda: setattr(late, "polls", 0))
    first, second = world.start(rounds=2, buffered=True, **MIXED).versions("support")[1:]
    assert first.bases == pytest.approx({"bfloat16": 1.0})
    assert set(second.bases) == {"bfloat16", "nf4"}
    assert second.bases["nf4"] == second.weights["b"] < 1 / 3


def test_opening_a_registry_changes_nothing_that_is_published(world: World) -> None:
    world.join("c")
    world.leave("b")
    before = world.start(rounds=1).read(v(1))
    world.join("b")
    world.start("two", rounds=0, **MIXED)
    assert AdapterRegistry(world.root).read(v(1)) == before


@pytest.mark.parametrize(
    ("second", "found"),
    [({}, [RoundState.PROMOTED]), (MIXED, [RoundState.FAILED, RoundState.PROMOTED])],
    ids=["as before", "switched on"],
)
def test_a_run_that_mixes_bases_takes_over_no_round_of_one_that_did_not(
    world: World, monkeypatch: pytest.MonkeyPatch, second: dict[str, bool], found: list[RoundState]
) -> None:
    """Its orders say another thing, which sites that have an order of that round would refuse."""
    world.join("c")
    world.leave("b")
    with killed_after(monkeypatch, lambda groups: groups[-1].startswith("round")):
        world.start(rounds=1)
    registry = world.start("two", rounds=1, **second)
    assert states(registry) == found
