"""Hostile sites against a whole federation: the round goes on without them, and the manifest says why."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from server.registry.registry import AdapterRegistry
from server.registry.round_log import RoundState
from tests.toys.federation import World, a_world, states
from tests.toys.hostile.catalogue import ADAPTERS, Hostile
from tests.toys.hostile.sites import REPLIES, SIGNED
from tests.toys.registry import v
from tests.toys.site import ToySite
from umbel import peft_dir

pytestmark = pytest.mark.slow


@pytest.fixture
def world(tmp_path: Path, sockets: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with a_world(tmp_path / "registry", sockets, monkeypatch) as ready:
        yield ready


def reasons(world: World, registry: AdapterRegistry) -> str:
    """Return every reason why a site was left out of the aggregate or of the judgement."""
    record = registry.rounds.find("support", 1)
    assert record is not None
    return " | ".join([*registry.manifest(v(1)).left_out.values(), *record.reasons.values()])


def goes_on_without_c(world: World, says: str, **settings: object) -> None:
    registry = world.start(rounds=1, **settings)
    assert states(registry) == [RoundState.PROMOTED]
    manifest = registry.manifest(v(1))
    assert {"a", "b"} <= set(manifest.weights) <= {"a", "b", "c"} - set(manifest.left_out)
    stored = [sum(folder.name.startswith("v0") for folder in (world.root / "support").iterdir())]
    stored += [len(list((world.root / "blobs").iterdir()))]
    assert stored == [2, 2], "the untrained adapter, the round's, and nothing of what was refused"
    assert [world.sites[name].live for name in "ab"] == ["support@v1"] * 2
    assert re.search(says, reasons(world, registry)), reasons(world, registry)
    for line in (world.root / "events.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # JSON has no Infinity
    assert registry.verify(v(1)) == []


def honest_again(world: World, **settings: object) -> None:
    """A good site of the same name takes part in the next round."""
    world.grid.nodes.pop(3)
    with ToySite("c", world.sites["c"].socket.with_name("c2.sock")) as honest:
        honest.key = world.sites["c"].key
        world.grid.nodes[4] = honest.socket
        registry = world.start("two", rounds=1, **settings)
        assert set(registry.manifest(v(2)).weights) == {"a", "b", "c"}
        assert honest.live == "support@v2"


@pytest.mark.parametrize("one", REPLIES, ids=lambda one: one.what)
def test_a_hostile_site_is_left_out_and_says_why(world: World, one: Hostile) -> None:
    one.make(world.join_c())
    goes_on_without_c(world, one.says)
    honest_again(world)


@pytest.mark.parametrize("one", SIGNED, ids=lambda one: one.what)
def test_a_site_that_does_not_sign_what_it_says_is_left_out(world: World, tmp_path: Path, one: Hostile) -> None:
    site, keys = world.join_c(), tmp_path / "sites"
    keys.mkdir()
    for name, each in world.sites.items():
        each.key = Ed25519PrivateKey.generate()
        public = each.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        (keys / f"{name}.pub").write_bytes(public)
    one.make(site)
    goes_on_without_c(world, one.says, **{"site-keys": str(keys)})
    assert ("POST", "/adapters/support@v1/promote") not in site.calls, "it has no vote"
    honest_again(world, **{"site-keys": str(keys)})


@pytest.mark.parametrize("one", ADAPTERS, ids=lambda one: one.what)
def test_a_hostile_update_is_left_out(world: World, one: Hostile) -> None:
    site = world.join_c()
    site.update = lambda key: one.make(peft_dir.decode(site._parents[key]))  # type: ignore[method-assign]
    goes_on_without_c(world, one.says)
    assert set(AdapterRegistry(world.root).manifest(v(1)).weights) == {"a", "b"}


def test_two_sites_of_one_name_are_one_and_the_first_keeps_it(world: World) -> None:
    twin = world.join_c()
    twin.name = "a"
    registry = world.start(rounds=1)
    assert set(registry.manifest(v(1)).weights) == {"a", "b"}
    assert twin.orders == {} or world.sites["a"].orders == {}, "one of the two was asked"
