"""The ClientApp against a site's control API on a real Unix socket."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from pydantic import BaseModel

from client.flower.app import app
from server.registry.pin import Pin
from strategies.records import pack, unpack, unpack_adapter
from tests.toys.site import ToySite
from umbel import peft_dir
from umbel.adapter import AdapterManifest, Lifecycle
from umbel.messages import (
    AdapterQuery,
    Failure,
    Hello,
    HelloQuery,
    JobState,
    LiveVersion,
    Restore,
    Restored,
    RoundOrder,
    RoundQuery,
    RoundReport,
    Shadow,
    ShadowReport,
    Submit,
    TrainPlan,
    VersionQuery,
)


@pytest.fixture(autouse=True)
def _identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for field in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, field, 1)


@pytest.fixture
def site(sockets: Path) -> Iterator[ToySite]:
    with ToySite("clinic-a", sockets / "a.sock") as running:
        yield running


def ask(kind: str, body: BaseModel | None, socket: Path | str | None, adapter: bytes | None = None) -> RecordDict:
    message = Message(pack(body, adapter), 5, kind)
    config = {} if socket is None else {"socket": str(socket)}
    return app(message, Context(1, 5, config, RecordDict(), {})).content


def order(site: ToySite, parent: bytes, key: str = "abc-1-def") -> RoundOrder:
    plan = TrainPlan(rank=2, steps=3, seconds=10.0)
    return RoundOrder(key=key, base=site.base.digest, parent=peft_dir.digest(parent), round=1, plan=plan)


def initial(site: ToySite) -> bytes:
    return peft_dir.encode(Pin.of(site.hello(), 2).initial(0))


def test_hello_is_the_daemons(site: ToySite) -> None:
    assert unpack(ask("query.hello", HelloQuery(adapter="support"), site.socket), Hello) == site.hello()


def test_a_round_is_submitted_twice_collected_and_comes_with_its_update(site: ToySite) -> None:
    parent = initial(site)
    submit = Submit(adapter="support", order=order(site, parent))
    first = unpack(ask("train.submit", submit, site.socket, parent), RoundReport)
    assert first == unpack(ask("train.submit", submit, site.socket, parent), RoundReport)
    assert isinstance(first, RoundReport)
    assert first.state is JobState.RUNNING
    query = RoundQuery(adapter="support", key=first.key)
    running = ask("query.collect", query, site.socket)
    assert unpack_adapter(running) is None
    done = ask("query.collect", query, site.socket)
    assert unpack(done, RoundReport).state is JobState.DONE
    assert unpack_adapter(done) is None, "only who fetches it gets the update"
    done = ask("query.collect", query.model_copy(update={"fetch": True}), site.socket)
    report, update = unpack(done, RoundReport), unpack_adapter(done)
    assert isinstance(report, RoundReport)
    assert update == site.update(first.key)
    assert report.update == peft_dir.digest(update or b"")
    assert done["metrics"]["num-loss-tokens"] == report.num_loss_tokens == 100


def test_a_round_that_ends_while_its_order_is_held_costs_one_message(site: ToySite) -> None:
    site.polls = -1
    parent = initial(site)
    submit = Submit(adapter="support", order=order(site, parent))
    assert unpack_adapter(ask("train.submit", submit, site.socket, parent)) is None, "only who fetches it gets it"
    done = ask("train.submit", submit.model_copy(update={"fetch": True}), site.socket, parent)
    assert unpack(done, RoundReport).state is JobState.DONE
    assert unpack_adapter(done) == site.update(submit.order.key)
    assert site.waits == {"20"}


def test_a_version_is_shadowed_promoted_rolled_back_and_restored(site: ToySite) -> None:
    blob = initial(site)
    manifest = AdapterManifest(
        name="support", version=3, digest=peft_dir.digest(blob), base=site.base.digest, lineage="l", round=3, rank=2,
        target_modules=("q_proj", "v_proj"),
    )  # fmt: skip
    version = VersionQuery(ref="support@v3")
    pushed = Shadow(manifest=manifest, signature="ab" * 64)
    assert unpack(ask("query.shadow", pushed, site.socket, blob), ShadowReport).state is Lifecycle.PROBING
    assert site.signatures == {"support@v3": "ab" * 64}
    ask("query.collect", version, site.socket)
    assert unpack(ask("query.collect", version, site.socket), ShadowReport).verdict.accepted
    assert unpack(ask("query.promote", version, site.socket), ShadowReport).state is Lifecycle.LIVE
    for ref in (None, "support@v3"):
        assert unpack(restore(site, ref), Restored) == Restored(live=ref, state=Lifecycle.LIVE if ref else None)
    for instead_of, live in (("support@v2", "support@v3"), (None, None)):
        rolled = ask("query.rollback", AdapterQuery(adapter="support", instead_of=instead_of), site.socket)
        assert unpack(rolled, LiveVersion) == LiveVersion(live=live)
    against = unpack(restore(site, "support@v3"), Restored)
    assert against == Failure(error="Conflict: /adapters/support/restore?ref=support%40v3: no", final=True)
    ask("query.shadow", Shadow(manifest=manifest.model_copy(update={"version": 4})), site.socket, blob)
    version = VersionQuery(ref="support@v4")
    assert unpack(ask("query.discard", version, site.socket), ShadowReport).state is Lifecycle.REJECTED


def restore(site: ToySite, ref: str | None) -> RecordDict:
    return ask("query.restore", Restore(adapter="support", ref=ref), site.socket)


FORCED = "support@v3/promote?forced=true&rest="


@pytest.mark.parametrize("adapter", [FORCED, "support@v3/promote#", "../hello", "support@v3/promote?forced=true/\0"])
def test_a_name_from_the_centre_cannot_become_another_call(site: ToySite, adapter: str) -> None:
    manifest = AdapterManifest(
        name=adapter, version=3, digest="f" * 64, base="f" * 64, lineage="l", round=3, rank=2, target_modules=()
    )
    submit = Submit.model_construct(adapter=adapter, order=order(site, initial(site)))
    for kind, body in (
        ("query.rollback", AdapterQuery.model_construct(adapter=adapter)),
        ("query.restore", Restore.model_construct(adapter=adapter, ref=None)),
        ("query.shadow", Shadow(manifest=manifest)), ("train.submit", submit),
    ):  # fmt: skip
        failure = unpack(ask(kind, body, site.socket, initial(site)), RoundReport)
        assert isinstance(failure, Failure)
        assert failure.final
        assert "is not a path of the control API" in failure.error or "cannot name an adapter" in failure.error
    assert site.calls == []


@pytest.mark.parametrize(
    ("status", "final"), [((404, "NotFound"), True), ((409, "Conflict"), True), ((422, "AdapterError"), True),
                          ((503, "EngineError"), False), ((500, "UmbelError"), False),
                          ((507, "NoRoom"), True)],
)  # fmt: skip
def test_the_daemons_error_is_passed_on(site: ToySite, status: tuple[int, str], final: bool) -> None:
    site.fail_with = status
    failure = unpack(ask("query.hello", HelloQuery(adapter="support"), site.socket), Hello)
    assert failure == Failure(error=f"{status[1]}: /hello?adapter=support&nonce=: no", final=final)


def test_an_answer_that_is_none_is_refused(site: ToySite) -> None:
    site.nonsense = True
    failure = unpack(ask("query.hello", HelloQuery(adapter="support"), site.socket), Hello)
    assert isinstance(failure, Failure)
    assert failure.final
    assert "did not answer with a Hello" in failure.error


def test_a_daemon_that_does_not_run_is_said_so_and_may_come_back(sockets: Path) -> None:
    failure = unpack(ask("query.hello", HelloQuery(adapter="support"), sockets / "none.sock"), Hello)
    assert isinstance(failure, Failure)
    assert not failure.final
    assert "is `umbel serve` running?" in failure.error


def test_a_supernode_without_a_socket_is_told_how_to_get_one() -> None:
    failure = unpack(ask("query.hello", HelloQuery(adapter="support"), None), Hello)
    assert isinstance(failure, Failure)
    assert failure.final
    assert "--node-config" in failure.error


@pytest.mark.parametrize(
    "kind",
    ["train.submit", "query.collect", "query.shadow", "query.promote", "query.rollback", "query.restore"],
)
def test_a_message_that_is_none_is_answered_not_raised(site: ToySite, kind: str) -> None:
    failure = unpack(ask(kind, None, site.socket), RoundReport)
    assert isinstance(failure, Failure)
    assert failure.final
    assert "WireError" in failure.error
    failure = unpack(ask(kind, VersionQuery(ref="no version"), site.socket), RoundReport)
    assert isinstance(failure, Failure)
    assert failure.final
