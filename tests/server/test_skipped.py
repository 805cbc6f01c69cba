"""Sites where nothing is worth training: they took part, what the round becomes, and who may say so."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from server.registry.events import EVENTS, EventTail
from server.registry.index import INDEX
from server.registry.registry import AdapterRegistry
from server.registry.round_log import RoundState
from tests.toys.federation import World, a_world, states
from tests.toys.registry import v
from umbel.messages import JobState

WHY = "nothing worth training: the loss on what is set aside is flat"


@pytest.fixture
def world(tmp_path: Path, sockets: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with a_world(tmp_path / "registry", sockets, monkeypatch) as ready:
        yield ready


@pytest.mark.parametrize("polls", [-1, 1])
def test_a_site_that_skips_counts_for_the_quorum_and_the_others_make_the_version(world: World, polls: int) -> None:
    """With -1 the report comes with the answer to the order, with 1 it is asked for."""
    for site in world.sites.values():
        site.polls = polls
    world.sites["b"].skips = WHY
    registry = world.start(rounds=1)
    assert states(registry) == [RoundState.PROMOTED]
    version = registry.manifest(v(1))
    assert (version.weights, version.skipped, version.left_out) == ({"a": 1.0}, {"b": WHY}, {})
    assert registry.rounds.all("support")[0].reasons["b"] == f"{WHY}; accepted: held-out loss 1.00, live 1.20"
    assert all(site.manifests["support@v1"].skipped == {} for site in (world.sites["a"], world.sites["b"]))
    assert world.sites["b"].live == "support@v1", "it judges and serves what the others trained"
    assert [(one["site"], one["reason"]) for one in world.told("site.skipped")] == [("b", WHY)]
    assert [one["site"] for one in world.told("site.trained")] == ["a"]


def test_where_all_skip_the_round_is_idle_and_nothing_moves(world: World) -> None:
    registry = world.start(rounds=1)
    for site in world.sites.values():
        site.skips = WHY
    began = world.clock()
    world.start("two", rounds=2)
    assert states(registry) == [RoundState.PROMOTED, RoundState.IDLE, RoundState.IDLE]
    assert registry.aliases("support") == {"head": v(1), "live": v(1)}
    assert len(registry.versions("support")) == 2
    assert registry.rounds.all("support")[1].reasons == {
        "a": WHY, "b": WHY, "*": "nothing is worth training at 2 sites",
    }  # fmt: skip
    assert [one["reasons"]["a"] for one in world.told("round.idle")] == [WHY, WHY]
    assert not world.told("round.failed")
    assert world.clock() - began >= 5, "the second question comes later"
    for site in world.sites.values():
        site.skips = ""
    world.start("three", rounds=1)
    assert states(registry)[-1] is RoundState.PROMOTED, "the sites are asked again"


def test_below_the_quorum_a_round_fails_whoever_skips(world: World) -> None:
    world.sites["a"].skips = WHY
    world.sites["b"].tokens = 0
    registry = world.start(rounds=1)
    assert states(registry) == [RoundState.FAILED]
    assert "0 of 2 updates" in registry.rounds.all("support")[0].reasons["*"]


def test_a_refused_update_is_no_reason_to_call_a_round_idle(world: World) -> None:
    world.join_c()
    world.sites["a"].skips = world.sites["b"].skips = WHY
    world.sites["c"].tokens = 0
    registry = world.start(rounds=1)
    assert states(registry) == [RoundState.IDLE], "two of two took part, and the third one is named"
    assert "nothing to weigh it by" in registry.rounds.all("support")[0].reasons["c"]


def test_a_robust_rule_still_needs_its_own_number_of_updates(world: World) -> None:
    world.join_c()
    world.sites["b"].skips = world.sites["c"].skips = WHY
    settings = {"robust": "fltrust", "trusted-site": "b"}
    registry = world.start(rounds=1, **settings)
    assert states(registry) == [RoundState.FAILED]
    assert "no update of the trusted site" in registry.rounds.all("support")[0].reasons["a"]


def test_only_the_site_itself_can_say_that_it_skips(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "sites"
    folder.mkdir()
    for name in "ab":
        key = world.sites[name].key = Ed25519PrivateKey.generate()
        public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        (folder / f"{name}.pub").write_bytes(public)
    world.sites["b"].skips = WHY
    settings = {"rounds": 1, "site-keys": str(folder)}
    assert world.start(**settings).manifest(v(1)).skipped == {"b": WHY}
    world.sites["b"].tamper = lambda report: report.model_copy(update={"error": "another reason"})
    registry = world.start("two", **settings)
    assert states(registry)[-1] is RoundState.FAILED
    assert "signature is not by this site's key" in registry.rounds.all("support")[-1].reasons["b"]
    world.sites["b"].skips = ""
    world.sites["b"].tamper = lambda report: report.model_copy(update={"state": JobState.SKIPPED})
    registry = world.start("three", **settings)
    assert states(registry)[-1] is RoundState.FAILED, "a signed update cannot be made a skipped round"


def test_a_late_skip_of_a_buffered_run_is_no_update_and_harms_nothing(world: World) -> None:
    late = world.join_c()
    late.polls, late.skips = 10**6, WHY
    registry = world.start(rounds=1, buffered=True)
    assert "its late update counts in the next round" in registry.manifest(v(1)).left_out["c"]
    late.polls = 1
    world.start("two", rounds=1, buffered=True)
    assert registry.manifest(v(2)).skipped == {"c": WHY}


def test_the_figures_count_who_skipped_and_an_index_that_is_made_anew_knows_idle_rounds(world: World) -> None:
    world.sites["b"].skips = WHY
    registry = world.start(rounds=1)
    tail = EventTail(world.root / EVENTS)
    tail.catch_up()
    last = tail.last["support"]
    assert (last.admitted, last.skipped, last.left_out) == (1, 1, 0)
    world.sites["a"].skips = WHY
    world.start("two", rounds=1)
    tail.catch_up()
    assert (last.admitted, last.skipped, last.left_out) == (0, 2, 0)
    known = registry.rounds.all("support")
    registry.close()
    (world.root / INDEX).unlink()
    again = AdapterRegistry(world.root)
    assert [one.state for one in again.rounds.all("support")] == [one.state for one in known]
    assert [WHY in one.reasons["b"] for one in again.rounds.all("support")] == [True, True]
    again.close()
