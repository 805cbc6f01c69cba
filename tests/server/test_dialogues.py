"""Dialogues with one site: how often it is asked, and the answers that end the wait."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from flwr.supercore.task_identity import TaskIdentity

from server import dialogues
from server.dialogues import Reply
from server.keyring import Keyring
from tests.toys.exchange import ORDER, World
from tests.toys.registry import v
from tests.toys.site import BASE
from umbel.adapter import AdapterManifest, Lifecycle
from umbel.messages import ShadowReport, Verdict

REF = str(v(1))
MANIFEST = AdapterManifest(
    name="support", version=1, digest="0" * 64, base=BASE.digest, lineage="test", round=1, rank=2,
    target_modules=("q_proj", "v_proj"),
)  # fmt: skip


def test_a_shadow_that_is_watched_is_asked_for_until_it_has_a_verdict() -> None:
    dialogue = dialogues.shadow("a", Keyring(None), MANIFEST, b"", "")
    request = next(dialogue)
    assert request.message_type == "query.shadow"
    for state in (Lifecycle.CANDIDATE, Lifecycle.PROBING, Lifecycle.WATCHING, Lifecycle.WATCHING):
        request = dialogue.send(Reply(ShadowReport(ref=REF, state=state)))
        assert (request.message_type, request.delay) == ("query.collect", dialogues.POLL_S)
    judged = ShadowReport(ref=REF, state=Lifecycle.JUDGED, verdict=Verdict(accepted=True, reasons=("better",)))
    with pytest.raises(StopIteration) as stop:
        dialogue.send(Reply(judged))
    assert stop.value.value == judged


@pytest.fixture
def world(sockets: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    for field in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, field, 1)
    with ExitStack() as stack:
        yield World(sockets, stack)


def test_a_site_is_not_asked_more_often_than_every_two_seconds(world: World) -> None:
    world.a.polls = world.b.polls = 10
    world.grid.latency = 0.0
    world.gather()
    start = world.clock()
    world.train()
    assert world.clock() - start >= 20


def test_asking_how_a_round_stands_brings_no_adapter(world: World) -> None:
    world.gather()
    world.a.polls = 5
    world.train()
    fetched = ("GET", f"/adapters/support/rounds/{ORDER.key}/update")
    assert world.a.calls.count(fetched) == world.b.calls.count(fetched) == 1
