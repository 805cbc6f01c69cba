"""A site that trains alone: whole rounds over its socket, trouble on the way, and what comes after."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from server.alone import LOOK_S
from server.registry.events import EVENTS, EventReader
from server.registry.registry import AdapterRegistry
from server.registry.round_log import RoundState
from tests.toys.alone import AloneAt
from tests.toys.federation import a_world
from tests.toys.registry import v
from tests.toys.site import ToySite
from umbel import peft_dir
from umbel.base.fingerprint import BaseFingerprint
from umbel.errors import AdapterError, BaseMismatch, ConfigError
from umbel.messages import JobState, RoundReport

OTHER = BaseFingerprint(weights="w2", config="c", quantization="q", tokenizer="t", chat_template="x")


@pytest.fixture
def site(sockets: Path) -> Iterator[ToySite]:
    with ToySite("a", sockets / "a.sock") as running:
        yield running


@pytest.fixture
def alone(tmp_path: Path, site: ToySite) -> AloneAt:
    return AloneAt(tmp_path / "registry", site.socket)


def aliases(alone: AloneAt) -> dict:
    registry = AdapterRegistry(alone.root)
    found = registry.aliases("support")
    registry.close()
    return found


def test_every_round_trains_from_head_and_goes_live_and_the_update_is_the_version(
    alone: AloneAt, site: ToySite
) -> None:
    assert [record.state for record in alone.start()] == [RoundState.PROMOTED] * 2
    assert aliases(alone) == {"head": v(2), "live": v(2)}
    assert site.live == "support@v2"
    registry = AdapterRegistry(alone.root)
    keys = {order.round: key for key, order in site.orders.items()}
    for number in (1, 2):
        blob, manifest = registry.read(v(number))
        assert peft_dir.decode(blob).keys() == peft_dir.decode(site.update(keys[number])).keys()
        for name, array in peft_dir.decode(site.update(keys[number])).items():
            assert (peft_dir.decode(blob)[name] == array).all()
        assert (manifest.strategy, manifest.weights, manifest.left_out) == ("alone", {"a": 1.0}, {})
        assert set(manifest.certificate.values()) == set(manifest.change_certificate.values()) == {0.0}
        assert manifest.parent == registry.manifest(v(number - 1)).digest
    registry.close()


def test_the_events_are_a_federations(alone: AloneAt) -> None:
    alone.start(rounds=1)
    assert [event["event"] for event in EventReader(alone.root / EVENTS).read()] == [
        "run.started", "round.started", "site.trained", "round.trained", "round.published", "site.judged",
        "round.judged", "round.promoted", "run.finished",
    ]  # fmt: skip
    (ended,) = alone.told("round.promoted")
    assert set(ended["seconds"]) == {"train", "transfer", "aggregate", "load", "probe", "promote"}
    assert ended["sites"] == ["a"]


def test_a_round_that_ends_while_its_order_is_held_costs_four_calls(alone: AloneAt, site: ToySite) -> None:
    site.polls = -1
    alone.start(rounds=3)
    calls = [path.rpartition("/")[2] if path.count("/") > 2 else path for _, path in site.calls]
    keys = {order.round: key for key, order in site.orders.items()}
    asked = [[keys[number], "update", "shadow", "promote"] for number in (1, 2, 3)]
    assert calls == ["/hello", *asked[0], *asked[1], *asked[2], "/hello"]


def test_a_version_that_is_no_better_is_discarded_and_the_next_round_trains_from_head(
    alone: AloneAt, site: ToySite
) -> None:
    alone.start(rounds=1)
    site.accepts, site.otherwise = False, "keep"
    (record,) = alone.start("two", rounds=1)
    assert record.state is RoundState.REJECTED
    assert record.reasons["a"] == "undecided: held-out loss 1.00, live 1.20"
    assert (aliases(alone), site.live) == ({"head": v(1), "live": v(1)}, "support@v1")
    assert site.shadows["support@v2"].state == "rejected", "it is loaded no more"
    site.accepts = True
    alone.start("three", rounds=1)
    orders = {order.round: order for order in site.orders.values()}
    assert orders[3].parent == orders[2].parent, "both trained from v1"
    assert len({order.plan.seed for order in orders.values()}) == 3, "and saw the data in another order"
    assert site.live == "support@v3"


def test_a_daemon_that_is_away_for_a_while_is_waited_for(alone: AloneAt, site: ToySite) -> None:
    waits = []

    def away_three_times() -> None:
        waits.append(alone.clock.now)
        site.fail_with = (503, "EngineError") if 2 <= len(waits) < 5 else None

    alone.clock.woken = away_three_times
    assert [record.state for record in alone.start()] == [RoundState.PROMOTED] * 2
    assert len(waits) >= 5
    assert len(site.orders) == 2


def test_after_failed_rounds_the_next_begins_later_and_later(alone: AloneAt, site: ToySite) -> None:
    def failed(report: RoundReport) -> RoundReport:
        return report.model_copy(update={"state": JobState.FAILED, "error": "no memory", "update": None})

    site.tamper = failed
    records = alone.start(rounds=8)
    assert {record.state for record in records} == {RoundState.FAILED}
    assert records[0].reasons["a"] == "training failed: no memory"
    assert alone.pauses == [5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 300.0, 300.0]
    site.tamper = lambda report: report
    alone.start("two", rounds=1)
    assert alone.pauses[-1] == 0.0
    assert site.live == "support@v1"


def test_after_an_idle_round_it_asks_again_later_or_as_soon_as_the_site_has_other_examples(
    alone: AloneAt, site: ToySite
) -> None:
    site.skips = "nothing worth training: the loss is flat"

    def took(run_id: str) -> float:
        began = alone.clock.now
        assert {record.state for record in alone.start(run_id, rounds=6)} == {RoundState.IDLE}
        return alone.clock.now - began

    patient = took("one")
    assert alone.pauses == [5.0, 10.0, 20.0, 40.0, 60.0, 60.0]

    def change() -> None:
        site.changes += 1

    alone.clock.woken = change
    assert patient - took("two") == 5 + 10 + 20 + 40 + 60 - 5 * LOOK_S


def test_nothing_that_is_no_number_becomes_a_version(alone: AloneAt, site: ToySite) -> None:
    site.hurt = lambda tensors: {name: array * float("nan") for name, array in tensors.items()}
    (record,) = alone.start(rounds=1)
    assert record.state is RoundState.FAILED
    assert "NaN" in record.reasons["a"]
    assert aliases(alone) == {"head": v(0)}


def test_a_federation_goes_on_from_its_registry(tmp_path: Path, sockets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with a_world(tmp_path / "registry", sockets, monkeypatch) as world:
        AloneAt(world.root, world.sites["a"].socket).start()
        world.sites["b"].live = world.sites["a"].live
        registry = world.start("flower", rounds=1)
        manifest = registry.versions("support")[-1]
        assert (manifest.version, manifest.round, manifest.strategy) == (3, 3, "exact")
        assert manifest.parent == registry.manifest(v(2)).digest
        assert world.live == {"a": "support@v3", "b": "support@v3", "c": None}
        assert [record.state for record in AloneAt(world.root, world.sites["a"].socket).start("again", rounds=1)] == [
            RoundState.PROMOTED
        ]
        assert world.sites["a"].live == "support@v4", "and the site alone goes on from the federation's"


def test_an_operators_roll_back_in_the_registry_reaches_the_site_and_the_next_round_trains_from_there(
    alone: AloneAt, site: ToySite
) -> None:
    alone.start()
    registry = AdapterRegistry(alone.root)
    registry.roll_back("support", who="eva", why="worse answers")
    registry.close()
    alone.start("two", rounds=1)
    assert alone.told("fleet.reconciled")[0]["brought"] == {"a": "support@v2"}
    orders = {order.round: order for order in site.orders.values()}
    assert orders[3].parent == orders[2].parent
    assert site.live == "support@v3"


def test_a_site_of_another_base_is_refused_before_a_round_begins(alone: AloneAt, site: ToySite) -> None:
    alone.start(rounds=1)
    site.base = OTHER
    with pytest.raises(
        BaseMismatch, match=r"another base than .*registry: weights differ; serve the base .* --registry"
    ):
        alone.start("two")
    assert len(site.orders) == 1


def test_a_base_that_changes_meanwhile_fails_the_round_by_name_and_may_come_back(alone: AloneAt, site: ToySite) -> None:
    base = site.base
    alone.start(rounds=1)
    waits = []

    def swapped() -> None:
        waits.append(alone.clock.now)
        site.fail_with = (503, "EngineError") if len(waits) == 1 else None
        site.base = OTHER if alone.told("round.failed") == [] else base

    alone.clock.woken = swapped
    records = alone.start("two", rounds=2)
    assert [record.state for record in records] == [RoundState.FAILED, RoundState.PROMOTED]
    assert "weights differ" in str(records[0].reasons)


def test_a_site_that_is_called_otherwise_meanwhile_fails_the_round_and_is_asked_under_its_new_name(
    alone: AloneAt, site: ToySite
) -> None:
    hello, waits = site.hello(), []

    def renamed() -> None:
        waits.append(alone.clock.now)
        site.fail_with = (503, "EngineError") if len(waits) == 1 else None
        site.name = "b"

    alone.clock.woken = renamed
    records = alone.start(rounds=2)
    assert hello.site == "a"
    assert [record.state for record in records] == [RoundState.FAILED, RoundState.PROMOTED]
    assert len(waits) < 200, "it waits between two looks"
    assert alone.told("round.promoted")[0]["sites"] == ["b"]


def test_a_daemon_that_does_not_train_the_adapter_is_said_to_be_older_than_its_file(
    alone: AloneAt, site: ToySite, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = site.hello()
    monkeypatch.setattr(site, "hello", lambda adapter: there.model_copy(update={"adapter": None}))
    with pytest.raises(ConfigError, match=r"does not train 'support'.*end it, and start again"):
        alone.start()


@pytest.mark.parametrize("known", ["live", "went_back_from"])
def test_versions_of_another_registry_are_named(alone: AloneAt, site: ToySite, known: str) -> None:
    setattr(site, known, "support@v7" if known == "live" else ["support@v7"])
    with pytest.raises(ConfigError, match=r"a has support@v7, and .* has not: .* another registry's.*state_dir"):
        alone.start()
    assert site.orders == {}


def test_a_rank_that_the_site_does_not_serve_or_the_registry_does_not_have_is_refused(
    alone: AloneAt, site: ToySite
) -> None:
    alone.start(rounds=1)
    with pytest.raises(ConfigError, match="has rank 2"):
        alone.start("two", rank=4)
    site.max_lora_rank = 1
    with pytest.raises(ConfigError, match=r"has rank 2, and a serves it up to rank 1; raise \[engine\]"):
        alone.start("two")


def test_other_layers_are_refused(alone: AloneAt, site: ToySite) -> None:
    alone.start(rounds=1)
    site.shapes = {"model.layers.0.self_attn.q_proj": (6, 5)}
    with pytest.raises(AdapterError, match="adapts other layers"):
        alone.start("two")


def test_a_site_that_nobody_serves_is_said_so(tmp_path: Path, sockets: Path) -> None:
    with pytest.raises(ConfigError, match="is `umbel serve` running"):
        AloneAt(tmp_path / "registry", sockets / "none.sock").start()
