"""What a site is sent of the others: shares, reasons and means, and nothing that another site measured or trained."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.toys.federation import World, a_world
from tests.toys.registry import v
from tests.toys.site import ToySite
from umbel import peft_dir
from umbel.messages import RoundReport

TOKENS = {"a": 61, "b": 67, "c": 72}


@pytest.fixture
def world(tmp_path: Path, sockets: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with a_world(tmp_path / "registry", sockets, monkeypatch) as ready:
        ready.join_c()
        yield ready


class Sent:
    """Everything that is sent to a site."""

    def __init__(self, site: ToySite) -> None:
        self.all = b""
        self._answer = site.route
        site.route = self.route  # type: ignore[method-assign]

    def route(self, method: str, path: str, headers: dict[str, str], body: bytes) -> object:
        self.all += b"".join([path.encode(), *(f"{name}: {value}".encode() for name, value in headers.items()), body])
        return self._answer(method, path, headers, body)


def test_a_site_is_sent_no_other_sites_update_counts_or_measurements(world: World) -> None:
    sent = {name: Sent(site) for name, site in world.sites.items()}
    for step, (name, site) in enumerate(world.sites.items()):
        site.tokens, site.step, site.key = TOKENS[name], 0.5 + step, Ed25519PrivateKey.generate()
    registry = world.start(rounds=2)
    kept = registry.manifest(v(2))
    assert kept.counts.keys() == kept.site_metrics.keys() == set("abc"), "the centre has them"
    for name, site in world.sites.items():
        for ref, received in site.manifests.items():
            published = registry.manifest(v(int(ref.rpartition("v")[2])))
            nothing = published.model_copy(update={"counts": {}, "site_metrics": {}})
            assert received == nothing, "all but what single sites counted and measured"
        for other, another in world.sites.items():
            for key in another.orders:
                update, report = another.update(key), another.report(key, asked=0)
                assert isinstance(report, RoundReport)
                secrets = [update, peft_dir.digest(update).encode(), report.signature.encode()]
                assert not any(secret in sent[name].all for secret in secrets), (name, other)


def test_from_shares_and_its_own_data_a_site_can_tell_how_much_the_others_have(world: World) -> None:
    """Which docs/security.md says: weights that go by data tell how much there is."""
    for name, site in world.sites.items():
        site.held = TOKENS[name]
    world.start(rounds=1)
    (received,) = world.sites["a"].manifests.values()
    told = {name: TOKENS["a"] * share / received.weights["a"] for name, share in received.weights.items()}
    assert told == pytest.approx(TOKENS)
