"""Signed orders and updates: an update counts only if its site signed it, for the order that it was given."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from server.orders import NONCE_KEY
from server.registry.registry import AdapterRegistry
from server.registry.round_log import RoundState
from tests.toys.federation import World, a_world, states
from tests.toys.site import ToySite
from umbel import signing
from umbel.errors import AdapterError, ConfigError, RegistryError
from umbel.messages import RoundOrder, RoundReport
from umbel.statements import UpdateStatement

CENTRE, STRANGER = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()


@pytest.fixture
def world(tmp_path: Path, sockets: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Three sites that sign; their public keys are in `site-keys`."""
    with a_world(tmp_path / "registry", sockets, monkeypatch) as ready:
        ready.join_c()
        (tmp_path / "sites").mkdir()
        for name, site in ready.sites.items():
            site.key = Ed25519PrivateKey.generate()
            write_public(tmp_path / "sites" / f"{name}.pub", site.key)
        path = tmp_path / "signing.key"
        path.write_bytes(CENTRE.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        path.chmod(0o600)
        yield ready


def write_public(path: Path, key: Ed25519PrivateKey) -> None:
    path.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


def start(world: World, run_id: str = "one", **settings: object) -> AdapterRegistry:
    keys = {"site-keys": str(world.root.parent / "sites"), "signing-key": str(world.root.parent / "signing.key")}
    return world.start(run_id, **{"rounds": 1, **keys, **settings})


def test_updates_that_their_sites_signed_are_taken(world: World) -> None:
    registry = start(world, rounds=2)
    assert states(registry) == [RoundState.PROMOTED] * 2
    for version in registry.versions("support")[1:]:
        assert (set(version.weights), version.left_out) == ({"a", "b", "c"}, {})


def resigned(
    site: ToySite, *, by: Ed25519PrivateKey | None = None, name: str = "", **changes: object
) -> Callable[[RoundReport], RoundReport]:
    """The same report, signed for an order that differs in `changes`; `by`: with that key, `name`: as that site."""

    def tamper(report: RoundReport) -> RoundReport:
        assert site.key is not None
        order = site.orders[report.key].model_copy(update=changes)
        signature = signing.sign(by or site.key, UpdateStatement.of(name or site.name, order, report))
        return report.model_copy(update={"signature": signature})

    return tamper


def altered(**changes: object) -> Callable[[ToySite], Callable[[RoundReport], RoundReport]]:
    return lambda site: lambda report: report.model_copy(update=changes)


WRONG = "the update's signature is not by this site's key, or is for another order, update or counts"
FORGERIES: dict[str, tuple[Callable[[ToySite], Callable[[RoundReport], RoundReport]], str]] = {
    "unsigned": (altered(signature=""), "the update is not signed; the site signs with `[site].signing_key`"),
    "more tokens": (altered(num_loss_tokens=101), WRONG),
    "more examples": (altered(num_examples=9), WRONG),
    "a lower loss": (altered(loss_sum=1.0), WRONG),
    "no digest": (altered(update=None), "it does not say which update it signed"),
    "another run": (lambda site: resigned(site, run="0" * 64), WRONG),
    "another round": (lambda site: resigned(site, round=2), WRONG),
    "another parent": (lambda site: resigned(site, parent="0" * 64), WRONG),
    "another nonce": (lambda site: resigned(site, nonce="0" * 64), WRONG),
    "another base": (lambda site: resigned(site, base="0" * 64), WRONG),
    "another order": (lambda site: resigned(site, key="l-1-p"), WRONG),
}


@pytest.mark.parametrize(("forge", "why"), FORGERIES.values(), ids=FORGERIES)
def test_an_update_that_its_site_did_not_sign_for_this_order_is_left_out_with_the_reason(
    world: World, forge: Callable[[ToySite], Callable[[RoundReport], RoundReport]], why: str
) -> None:
    world.sites["c"].tamper = forge(world.sites["c"])
    version = start(world).versions("support")[1]
    assert set(version.weights) == {"a", "b"}
    assert version.left_out.keys() == {"c"}
    assert why in version.left_out["c"]


def test_what_is_signed_with_another_key_or_for_another_site_is_left_out(world: World) -> None:
    c = world.sites["c"]
    c.tamper = resigned(c, by=STRANGER)
    assert WRONG in start(world).versions("support")[1].left_out["c"]
    c.tamper = resigned(c, by=world.sites["a"].key, name="a")  # an update of a's own, from c
    assert WRONG in start(world, "two").versions("support")[2].left_out["c"]


def test_the_update_of_the_last_round_is_no_update_of_this_one(world: World) -> None:
    """A whole replay: bytes and report of round 1, with the key and the parent that round 2 asks for."""
    c = world.sites["c"]
    seen: list[tuple[RoundReport, bytes]] = []
    honest = c.update

    def replay(report: RoundReport) -> RoundReport:
        if not seen or seen[0][0].key == report.key:
            seen[:] = [(report, honest(report.key))]
            return report
        return seen[0][0].model_copy(update={"key": report.key, "parent": report.parent})

    c.tamper = replay
    c.update = lambda key: seen[0][1] if seen else honest(key)  # type: ignore[method-assign]
    first, second = start(world, rounds=2).versions("support")[1:]
    assert set(first.weights) == {"a", "b", "c"}
    assert set(second.weights) == {"a", "b"}
    assert WRONG in second.left_out["c"]


def test_who_takes_the_name_of_a_site_that_is_away_is_not_that_site(world: World, sockets: Path) -> None:
    """A registered SuperNode can say any name in its hello; it cannot sign for it."""
    impostor = world.enter(ToySite("b", sockets / "impostor.sock"))
    impostor.key = STRANGER
    world.grid.nodes[2] = impostor.socket
    version = start(world).versions("support")[1]
    assert set(version.weights) == {"a", "c"}
    assert "site b: the hello's signature is not by this site's key" in version.left_out["b"]
    assert impostor.submits == []


def test_a_site_without_a_key_at_the_centre_is_asked_nothing_until_it_has_one(world: World) -> None:
    folder = world.root.parent / "sites"
    (folder / "c.pub").rename(folder / "c")
    version = start(world).versions("support")[1]
    assert f"c has no key in {folder}; put its public one there, as c.pub" in version.left_out["c"]
    assert not world.sites["c"].submits
    (folder / "c").rename(folder / "c.pub")
    assert set(start(world, "two").versions("support")[2].weights) == {"a", "b", "c"}


@pytest.mark.parametrize("name", ["../outside", "..", "/etc/ssl/a"])
def test_a_name_never_becomes_a_path(world: World, name: str) -> None:
    write_public(world.root.parent / "outside.pub", STRANGER)
    world.sites["c"].name, world.sites["c"].key = name, STRANGER
    version = start(world).versions("support")[1]
    assert set(version.weights) == {"a", "b"}
    assert not world.sites["c"].submits


@pytest.mark.parametrize(("content", "why"), [(None, "no NAME.pub here"), (b"nonsense", "not an Ed25519 public key")])
def test_keys_that_cannot_be_read_end_the_run_before_it_begins(world: World, content: bytes | None, why: str) -> None:
    folder = world.root.parent / "none"
    if content is not None:
        folder.mkdir()
        (folder / "a.pub").write_bytes(content)
    with pytest.raises(ConfigError, match=why):
        start(world, **{"site-keys": str(folder)})
    assert not any(site.submits for site in world.sites.values())


def test_without_site_keys_nobody_has_to_sign(world: World) -> None:
    world.sites["c"].key = None
    assert set(start(world, **{"site-keys": ""}).versions("support")[1].weights) == {"a", "b", "c"}


# Orders


def test_an_order_is_signed_with_all_that_is_in_it(world: World) -> None:
    start(world)
    (submit,) = world.sites["a"].submits
    signing.verify(CENTRE.public_key(), submit, submit.signature)
    order = submit.order
    other = {
        "key": "k", "base": "b", "kin": "1" * 64, "parent": "p", "round": 7, "run": "r", "nonce": "0" * 64,
        "plan": order.plan.model_copy(update={"steps": 5}),
    }  # fmt: skip
    assert other.keys() == RoundOrder.model_fields.keys()
    forged = [submit.model_copy(update={"order": order.model_copy(update={name: to})}) for name, to in other.items()]
    for one in [*forged, submit.model_copy(update={"adapter": "other"})]:
        with pytest.raises(AdapterError, match="its signature is not by the trusted key, or the order was changed"):
            signing.verify(CENTRE.public_key(), one, submit.signature)


def test_every_round_and_rank_has_a_nonce_of_its_own_and_every_plan_a_run(world: World) -> None:
    world.sites["c"].max_lora_rank = 1
    start(world, rounds=2)
    start(world, "two", steps=5)
    orders = {site: [submit.order for submit in world.sites[site].submits] for site in "abc"}
    assert orders["a"] == orders["b"]
    assert len({order.nonce for site in "ac" for order in orders[site]}) == 6
    assert [order.run == orders["a"][0].run for order in orders["a"]] == [True, True, False]


def _interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("lost", [(), ("registry.sqlite*",), ("registry.sqlite*", "events.jsonl")])
@pytest.mark.parametrize("run_id", ["one", "two"])
def test_an_order_is_the_same_to_the_letter_after_a_restart(world: World, run_id: str, lost: tuple[str, ...]) -> None:
    """A site refuses another order for the same key; the order stays the same when the registry's index was lost."""
    for site in world.sites.values():
        site.polls = 10**6
    world.clock.after(20, _interrupt)
    with pytest.raises(KeyboardInterrupt):
        start(world)
    for pattern in lost:
        for file in world.root.glob(pattern):
            file.unlink()
    for site in world.sites.values():
        site.polls = 1
    version = start(world, run_id).versions("support")[1]
    assert (set(version.weights), version.left_out) == ({"a", "b", "c"}, {})
    for site in world.sites.values():
        assert len(site.submits) == 2
        assert site.submits[0] == site.submits[1]


def test_the_key_of_the_nonces_is_private_and_a_damaged_one_is_named(world: World) -> None:
    start(world)
    path = world.root / NONCE_KEY
    assert (path.stat().st_mode & 0o777, path.stat().st_size) == (0o600, 32)
    path.write_bytes(b"")
    with pytest.raises(RegistryError, match=rf"{NONCE_KEY}: has 0 bytes, not 32; remove it"):
        start(world, "two")


def test_the_same_round_of_two_adapters_is_two_orders(world: World) -> None:
    """Both begin with the same untrained adapter, so their keys are the same; an update of one is none of the other."""
    given = {}
    for adapter in ("support", "billing"):
        start(world, f"of {adapter}", adapter=adapter)
        given[adapter] = world.sites["a"].submits[-1]
        for site in world.sites.values():
            site.orders.clear()  # a toy site knows a round by its key alone
    support, billing = given.values()
    assert support.order.key == billing.order.key
    assert support.order.nonce != billing.order.nonce
    assert support.signature != billing.signature
    assert billing.order == support.order.model_copy(update={"nonce": billing.order.nonce})
