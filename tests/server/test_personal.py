"""Federations with a personal part: the adapters that travel, and the manifests in the registry."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from server.registry.peft import export as adapter_export
from server.registry.round_log import RoundState
from tests.toys.federation import World, a_world, states
from tests.toys.registry import v
from umbel import peft_dir
from umbel.adapter import Personal
from umbel.peft_dir import Tensors

DUAL: dict[str, object] = {"strategy": "dual", "personal-rank": 3}
OWN = Personal(part="adapter", rank=3)


@pytest.fixture
def world(tmp_path: Path, sockets: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with a_world(tmp_path / "registry", sockets, monkeypatch) as ready:
        ready.join_c()
        yield ready


def as_fedsa(step: float) -> object:
    """Return the update of a site that keeps its B: A moved, B as it was received."""

    def hurt(tensors: Tensors) -> Tensors:
        return {
            name: np.zeros_like(array) if "lora_B" in name else (array.astype(np.float32) + step).astype(array.dtype)
            for name, array in tensors.items()
        }

    return hurt


def test_a_fedsa_federation_shares_a_and_says_that_b_stays(world: World, tmp_path: Path) -> None:
    for name, step in {"a": 0.5, "b": 1.0}.items():
        world.sites[name].hurt = as_fedsa(step)  # c sends its own B
    registry = world.start(strategy="fedsa")
    assert states(registry) == [RoundState.PROMOTED] * 2
    start = peft_dir.decode(registry.read(v(0))[0])
    blob, second = registry.read(v(2))
    assert second.personal == Personal(part="B")
    assert set(second.weights) == {"a", "b"}
    assert "lora_B was changed" in second.left_out["c"]
    for name, array in peft_dir.decode(blob).items():
        if "lora_B" in name:
            assert not array.any(), "by itself a version equals the base"
        else:
            assert np.allclose(array.astype(np.float32), start[name].astype(np.float32) + 2 * 0.75, atol=0.03)
    for site in world.sites.values():
        assert {order.plan.personal for order in site.orders.values()} == {Personal(part="B")}
        assert site.manifests["support@v2"].personal == Personal(part="B"), "so that it knows what to join"
    adapter_export.export(registry, v(2), tmp_path / "out")
    assert "| stays at the sites | factor B" in (tmp_path / "out" / adapter_export.CARD).read_text()


def test_a_fedsa_federation_admits_no_smaller_rank(world: World) -> None:
    world.sites["a"].hurt = world.sites["c"].hurt = as_fedsa(0.5)
    world.sites["b"].max_lora_rank = 1
    registry = world.start(rounds=1, strategy="fedsa")
    assert "serves adapters up to rank 1, this run needs 2; raise" in registry.versions("support")[1].left_out["b"]


def test_a_dual_federation_leaves_each_site_room_for_its_own_adapter(world: World, tmp_path: Path) -> None:
    world.sites["b"].max_lora_rank, world.sites["c"].max_lora_rank = 4, 3
    registry = world.start(**DUAL)
    assert states(registry) == [RoundState.PROMOTED] * 2
    second = registry.versions("support")[2]
    assert (second.personal, second.rank, second.joined_rank) == (OWN, 2, 5)
    assert second.options["personal_rank"] == 3
    assert set(second.weights) == {"a", "b"}
    assert (
        "site c serves adapters up to rank 3, this run needs 4, 3 of them for the adapter that stays there; raise "
        "[engine].max_lora_rank there and restart it, or run with a smaller personal-rank"
    ) in second.left_out["c"]
    assert not world.sites["c"].orders
    plans = {name: [order.plan for order in world.sites[name].orders.values()] for name in "ab"}
    assert {name: {(plan.rank, plan.personal) for plan in plans[name]} for name in "ab"} == {
        "a": {(2, OWN)}, "b": {(1, OWN)},
    }  # fmt: skip
    assert all(len({plan.seed for plan in plans[name]}) == 2 for name in "ab"), "each round has an order of its own"
    whole, small = (world.sites[name].manifests["support@v2"] for name in "ab")
    assert (whole.rank, whole.truncation_of, whole.personal) == (2, None, OWN)
    assert (small.rank, small.truncation_of, small.personal) == (1, second.digest, OWN)
    adapter_export.export(registry, v(2), tmp_path / "out")
    assert "an adapter of rank 3" in (tmp_path / "out" / adapter_export.CARD).read_text()


def test_a_later_run_with_another_strategy_leaves_nothing_at_the_sites(world: World) -> None:
    world.start(rounds=1, **DUAL)
    registry = world.start(run_id="two", rounds=1)
    assert [manifest.personal for manifest in registry.versions("support")] == [None, OWN, None]
    assert world.sites["a"].manifests["support@v2"].personal is None
