"""Signed hellos and verdicts: a quorum counts keys, whatever names a SuperNode uses, and nothing is taken twice."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from server.keyring import Keyring, new_nonce
from server.registry.registry import AdapterRegistry
from server.registry.round_log import RoundState
from tests.toys.federation import World, a_world, states
from tests.toys.site import BASE, ToySite
from umbel import signing
from umbel.errors import AdapterError, ConfigError
from umbel.messages import Hello, ShadowReport
from umbel.statements import HelloStatement, VerdictStatement

STRANGER = Ed25519PrivateKey.generate()
NO_HELLO = "the hello's signature is not by this site's key, or is for another question or another hello"
NO_VERDICT = "the verdict's signature is not by this site's key, or is for another question, version, registry or"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sites").mkdir()
    return tmp_path / "sites"


@pytest.fixture
def world(tmp_path: Path, folder: Path, sockets: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Three sites that sign; their public keys are in `site-keys`."""
    with a_world(tmp_path / "registry", sockets, monkeypatch) as ready:
        ready.join_c()
        for name, site in ready.sites.items():
            site.key = Ed25519PrivateKey.generate()
            write(folder, name, site.key)
        yield ready


def write(folder: Path, name: str, key: Ed25519PrivateKey) -> None:
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (folder / f"{name}.pub").write_bytes(public)


def start(world: World, run_id: str = "one", **settings: object) -> AdapterRegistry:
    return world.start(run_id, **{"rounds": 1, "site-keys": str(world.root.parent / "sites"), **settings})


def reasons(registry: AdapterRegistry, number: int = 1) -> dict[str, str]:
    record = registry.rounds.find("support", number)
    assert record is not None
    return record.reasons


# Hellos


def test_hellos_and_verdicts_that_their_sites_signed_count(world: World) -> None:
    registry = start(world, rounds=2)
    assert states(registry) == [RoundState.PROMOTED] * 2
    assert reasons(registry, 2)["*"] == "accepted by 3 of 3 sites, 2 needed"
    assert set(world.live.values()) == {"support@v2"}


def test_four_invented_names_with_one_key_are_one_vote(world: World, folder: Path, sockets: Path) -> None:
    """One registered SuperNode, or four of one holder: who has one key has one vote, and honest sites decide."""
    mallory = Ed25519PrivateKey.generate()
    names = ["mallory", "ghost-1", "ghost-2", "ghost-3"]
    for number, name in enumerate(names):
        site = world.enter(ToySite(name, sockets / f"{name}.sock"))
        site.key, site.accepts = mallory, True
        world.grid.nodes[10 + number] = site.socket
        world.sites[name] = site
    write(folder, "mallory", mallory)
    for name in "abc":
        world.sites[name].accepts = False
    registry = start(world, quorum=2)
    assert states(registry) == [RoundState.REJECTED]
    assert reasons(registry)["*"] == "accepted by 1 of 4 sites, 2 needed"
    assert set(registry.versions("support")[1].weights) == {"a", "b", "c", "mallory"}
    left_out = registry.versions("support")[1].left_out
    assert left_out.keys() == {"ghost-1", "ghost-2", "ghost-3"}
    assert all(f"{name} has no key in {folder}" in why for name, why in left_out.items())
    assert not any(world.sites[name].submits or world.sites[name].manifests for name in names[1:])


def test_four_names_with_copies_of_one_key_are_one_vote(world: World, folder: Path, sockets: Path) -> None:
    """Also where the centre has the key under each of the names: the first in the order of names keeps it."""
    shared = Ed25519PrivateKey.generate()
    for number, name in enumerate(["m-1", "m-2", "m-3", "m-4"]):
        site = world.enter(ToySite(name, sockets / f"{name}.sock"))
        site.key = shared
        world.grid.nodes[10 + number] = site.socket
        write(folder, name, shared)
    registry = start(world)
    assert reasons(registry)["*"] == "accepted by 4 of 4 sites, 2 needed"
    version = registry.versions("support")[1]
    assert set(version.weights) == {"a", "b", "c", "m-1"}
    assert version.left_out.keys() == {"m-2", "m-3", "m-4"}
    assert "m-2 has the same key as m-1" in version.left_out["m-2"]
    assert "one key is one vote; make m-2 a key of its own" in version.left_out["m-2"]


def test_one_key_does_not_make_the_first_quorum_that_pins_the_base(world: World, folder: Path, sockets: Path) -> None:
    world.grid.nodes.clear()
    other = BASE.model_copy(update={"weights": "mallory's"})
    shared = Ed25519PrivateKey.generate()
    for number, name in enumerate(["m-1", "m-2", "m-3"]):
        site = world.enter(ToySite(name, sockets / f"{name}.sock"))
        site.key, site.base = shared, other
        world.grid.nodes[10 + number] = site.socket
        write(folder, name, shared)
    registry = start(world)
    assert states(registry) == [RoundState.FAILED]
    assert registry.pin("support") is None


@pytest.mark.parametrize(
    ("key", "why"),
    [(None, "site c: the hello is not signed; the site signs with `[site].signing_key`"), (STRANGER, NO_HELLO)],
    ids=["unsigned", "another key"],
)
def test_a_hello_that_its_site_did_not_sign_is_refused_by_name_and_the_round_goes_on(
    world: World, key: Ed25519PrivateKey | None, why: str
) -> None:
    world.sites["c"].key = key
    registry = start(world)
    assert states(registry) == [RoundState.PROMOTED]
    assert why in registry.versions("support")[1].left_out["c"]
    assert world.sites["c"].submits == []
    assert world.sites["c"].manifests == {}


def test_a_hello_of_another_time_is_refused(world: World) -> None:
    seen: list[Hello] = []
    site = world.sites["c"]
    honest = site.sign_hello

    def replay(hello: Hello, nonce: str) -> Hello:
        seen.append(honest(hello, nonce))
        return seen[0]

    site.sign_hello = replay  # type: ignore[method-assign]
    registry = start(world)
    assert set(registry.versions("support")[1].weights) == {"a", "b", "c"}, "the first one is no replay"
    registry = start(world, "two")
    assert NO_HELLO in registry.versions("support")[2].left_out["c"]
    assert len({one.signature for one in seen}) == len(seen), "every question has a nonce of its own"


def test_every_field_of_a_hello_is_signed(world: World) -> None:
    key, nonce = Ed25519PrivateKey.generate(), new_nonce()
    hello = world.sites["a"].hello()
    signature = signing.sign(key, HelloStatement.of(nonce, hello))
    signing.verify(key.public_key(), HelloStatement.of(nonce, hello), signature)
    other: dict[str, Any] = {
        "site": "b", "adapter": "other", "fingerprint": BASE.model_copy(update={"weights": "o"}),
        "shapes": {"q_proj": (1, 1)}, "dtype": "float32", "max_lora_rank": 1, "train_examples": 11, "eval_examples": 6,
        "data_changes": 7,
        "kin": "1" * 64, "packing": "nf4",
        "live": "support@v1", "refused": ("support@v1",),
    }  # fmt: skip
    assert other.keys() == Hello.model_fields.keys() - {"signature"}
    for name, value in other.items():
        with pytest.raises(AdapterError, match="the hello's signature is not by this site's key"):
            signing.verify(
                key.public_key(), HelloStatement.of(nonce, hello.model_copy(update={name: value})), signature
            )


# Verdicts


def other(**changes: Any) -> Any:
    """A site that signs its verdicts as if what it signs differed in `changes`."""

    def spoil(site: ToySite) -> None:
        def sign(report: ShadowReport, nonce: str) -> ShadowReport:
            assert site.key is not None
            statement = VerdictStatement.of(site.name, nonce, site.manifests[report.ref], report)
            signature = signing.sign(changes.get("by", site.key), statement.model_copy(update=fields))
            return report.model_copy(update={"signature": signature})

        fields = {name: value for name, value in changes.items() if name != "by"}
        site.sign_verdict = sign  # type: ignore[method-assign,assignment]

    return spoil


def unsigned(site: ToySite) -> None:
    site.sign_verdict = lambda report, nonce: report  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (unsigned, "the verdict is not signed; the site signs with `[site].signing_key`"),
        (other(by=STRANGER), NO_VERDICT),
        (other(site="a"), NO_VERDICT),
        (other(nonce="0" * 64), NO_VERDICT),
        (other(lineage="another registry"), NO_VERDICT),
        (other(digest="0" * 64), NO_VERDICT),
    ],
    ids=["unsigned", "another key", "another site", "another question", "another registry", "other weights"],
)
def test_a_verdict_that_its_site_did_not_sign_for_this_question_is_no_vote(world: World, spoil: Any, why: str) -> None:
    spoil(world.sites["c"])
    registry = start(world)
    assert states(registry) == [RoundState.PROMOTED]
    assert why in reasons(registry)["c"]
    assert reasons(registry)["*"] == "accepted by 2 of 3 sites, 2 needed"
    assert ("POST", "/adapters/support@v1/promote") not in world.sites["c"].calls, "it follows when the round is over"


def test_a_verdict_is_not_taken_twice(world: World) -> None:
    """Who has seen a site's verdict of one run cannot give it again, when the version is judged anew in another one."""
    site, honest, seen = world.sites["c"], world.sites["c"].sign_verdict, []

    def replay(report: Any, nonce: str) -> Any:
        signed = honest(report, nonce)
        if isinstance(signed, ShadowReport) and signed.verdict is not None:
            seen.append(signed)
            return seen[0]
        return signed

    site.sign_verdict = replay  # type: ignore[method-assign]
    for name in "ab":
        world.sites[name].shadow_polls = 10**6  # no quorum yet: the round stays open where its run is killed
    world.clock.after(50, _interrupt)
    with pytest.raises(KeyboardInterrupt):
        start(world)
    for name in "ab":
        world.sites[name].shadow_polls = 0
    registry = start(world, "two", rounds=1)
    assert len(seen) > 1
    assert NO_VERDICT in reasons(registry)["c"]
    assert reasons(registry)["*"] == "accepted by 2 of 3 sites, 2 needed"


def _interrupt() -> None:
    raise KeyboardInterrupt


# Without keys, and the folder


def test_without_site_keys_a_site_is_whoever_says_its_name(world: World) -> None:
    world.sites["c"].key = None
    world.sites["b"].key = STRANGER
    registry = start(world, **{"site-keys": ""})
    assert reasons(registry)["*"] == "accepted by 3 of 3 sites, 2 needed"


def test_a_file_that_holds_no_key_is_the_trouble_of_its_own_site_only(world: World, folder: Path) -> None:
    keys = Keyring(folder)
    (folder / "aa.pub").write_text("half a key")
    (folder / "dangling.pub").symlink_to(folder / "nowhere")
    for name in "abc":
        keys.require_key(name)
    with pytest.raises(ConfigError, match=r"aa\.pub: not an Ed25519 public key"):
        keys.require_key("aa")
    with pytest.raises(ConfigError, match=r"dangling\.pub: the key cannot be read"):
        keys.require_key("dangling")


def test_a_key_that_was_replaced_counts_at_once(folder: Path) -> None:
    old, new = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    write(folder, "a", old)
    keys = Keyring(folder)
    keys.require_key("a")
    write(folder, "a", new)
    hello = Hello(
        site="a", adapter="support", fingerprint=BASE, shapes={"q_proj": (1, 1)}, dtype="float32", max_lora_rank=1,
        train_examples=1, eval_examples=1,
    )  # fmt: skip
    statement = HelloStatement.of(new_nonce(), hello)
    keys.require("a", statement, signing.sign(new, statement))
    with pytest.raises(AdapterError, match="not by this site's key"):
        keys.require("a", statement, signing.sign(old, statement))
