"""The sites that a run waits for: how many, which base and rank they need, and the advice where there are too few."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from server.registry.round_log import RoundState
from tests.toys.federation import World, a_world, states
from tests.toys.site import BASE
from umbel.errors import ConfigError, NotFound


@pytest.fixture
def world(tmp_path: Path, sockets: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with a_world(tmp_path / "registry", sockets, monkeypatch) as ready:
        yield ready


def test_a_site_with_another_base_is_refused_by_the_part_that_differs(world: World) -> None:
    world.start(rounds=1)
    world.join_c().base = BASE.model_copy(update={"chat_template": "other"})
    registry = world.start(run_id="two", rounds=1)
    assert "chat_template differ" in registry.versions("support")[2].left_out["c"]
    assert not world.sites["c"].orders


def test_sites_that_never_agree_fail_the_round_and_say_where_they_differ(world: World) -> None:
    world.sites["b"].base = BASE.model_copy(update={"weights": "other"})
    registry = world.start(rounds=1)
    assert states(registry) == [RoundState.FAILED]
    assert "weights differ" in registry.rounds.find("support", 1).reasons["b"]
    assert registry.versions("support") == []


def test_no_site_at_all_ends_the_run_with_advice(world: World) -> None:
    world.grid.nodes.clear()
    with pytest.raises(NotFound, match="is `umbel serve` running beside each"):
        world.start()


def test_another_rank_than_the_registrys_is_refused(world: World) -> None:
    world.start(rounds=1)
    with pytest.raises(ConfigError, match="run with rank=2"):
        world.start(run_id="two", rank=4)
