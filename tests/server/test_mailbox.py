"""The mailbox when an answer is announced and does not come: only Flower's pull waits for it."""

import threading
from collections.abc import Iterable, Iterator

import pytest
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from server.mailbox import Answer, Letter, Lost, Mailbox
from tests.toys.grid import Clock, ToyGrid

BOTH = (1, 2)


class HalfSent(ToyGrid):
    """Every node answers at once; answers of the nodes in `stuck` are announced, and come when `whole` is set."""

    def __init__(self) -> None:
        super().__init__(Clock(), {})
        self.stuck: set[int] = set()
        self.whole = threading.Event()
        self._sent: dict[str, Message] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = name = f"m{len(self.pushed)}"
            self.pushed.append((message.metadata.dst_node_id, message.metadata.message_type))
            self._sent[name] = message
            ids.append(name)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        there = [self._sent.pop(name) for name in message_ids if name in self._sent]
        if any(message.metadata.dst_node_id in self.stuck for message in there):
            self.whole.wait()
        return [Message(RecordDict(), reply_to=message) for message in there]


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch) -> Iterator[HalfSent]:
    for field in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, field, 1)
    made = HalfSent()
    yield made
    made.whole.set()


def mailbox(grid: Grid, clock: Clock) -> Mailbox:
    return Mailbox(grid, clock=clock, patience=0.05)


def letter(key: str, node: int, *, fetches: bool = False) -> Letter:
    return Letter(key, node, "query.collect", RecordDict(), fetches)


def received(box: Mailbox) -> dict[object, Answer]:
    return dict(box.receive(BOTH))


def test_an_answer_that_does_not_come_whole_is_lost_and_the_same_letter_sent_again_is_answered(grid: HalfSent) -> None:
    box = mailbox(grid, grid.clock)
    grid.stuck = {1}
    box.send([letter("a", 1)], "round 1")
    lost = received(box)["a"]
    assert isinstance(lost, Lost)
    assert "did not arrive whole" in lost.reason
    box.send([letter("b", 2)], "round 1")
    assert isinstance(received(box)["b"], RecordDict), "no other site waits for it"
    grid.stuck = set()
    box.send([letter("a", 1)], "round 1")
    assert isinstance(received(box)["a"], RecordDict)
    grid.whole.set()
    assert received(box) == {}, "what comes late is not wanted any more"


def test_a_slow_adapter_comes_in_beside_everything_else_and_is_the_only_one(grid: HalfSent) -> None:
    box = mailbox(grid, grid.clock)
    grid.stuck = {1}
    box.send([letter("slow", 1, fetches=True), letter("next", 2, fetches=True)], "round 1")
    assert received(box) == {}
    box.send([letter("b", 2)], "round 1")
    assert received(box).keys() == {"b"}, "the second adapter waits, a small answer does not"
    grid.whole.set()
    found: dict[object, Answer] = {}
    while found.keys() != {"slow", "next"}:
        found |= received(box)
    assert all(isinstance(answer, RecordDict) for answer in found.values())


def test_an_adapter_that_is_coming_does_not_expire_but_goes_with_its_node(grid: HalfSent) -> None:
    box = mailbox(grid, grid.clock)
    grid.stuck = {1}
    box.send([letter("slow", 1, fetches=True)], "round 1")
    assert received(box) == {}
    grid.clock.sleep(10_000)
    assert received(box) == {}
    assert isinstance(dict(box.receive([2]))["slow"], Lost)


def test_what_goes_wrong_in_a_pull_is_raised_where_answers_are_wanted(grid: HalfSent) -> None:
    class Broken(HalfSent):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            raise RuntimeError("the SuperLink is gone")

    box = mailbox(Broken(), grid.clock)
    box.send([letter("a", 1)], "round 1")
    with pytest.raises(RuntimeError, match="the SuperLink is gone"):
        received(box)
