"""Flower's Grid in one process and without a clock: runs the real ClientApp, and can lose, delay or break messages."""

from collections.abc import Iterable
from pathlib import Path

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import Run

from client.flower.app import app


class Clock:
    """Time that passes only when someone sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.due: list[tuple[float, object]] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for at, action in [entry for entry in self.due if entry[0] <= self.now]:
            self.due.remove((at, action))
            action()

    def after(self, seconds: float, action: object) -> None:
        """Call `action` once that much time has passed."""
        self.due.append((self.now + seconds, action))


class ToyGrid(Grid):
    """`nodes` maps the ids of online SuperNodes to their site's socket. Replies take `latency` seconds."""

    def __init__(self, clock: Clock, nodes: dict[int, Path], *, latency: float = 1.0) -> None:
        self.clock = clock
        self.nodes = nodes
        self.latency = latency
        self.silent: set[int] = set()
        """Nodes that are online but take messages and never answer, as a SuperNode that was killed."""
        self.errors: dict[str, list[int]] = {}
        """Message type → error codes for its next messages."""
        self.pushed: list[tuple[int, str]] = []
        self.most_adapters = 0
        """Most replies with an adapter that waited here at a time."""
        self.most_adapters_pulled = 0
        """Most adapters that one pull brought."""
        self._replies: dict[str, tuple[float, Message]] = {}

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        return Run.create_empty(1)

    def create_message(self, *_: object, **__: object) -> Message:
        raise NotImplementedError

    def send_and_receive(self, *_: object, **__: object) -> Iterable[Message]:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        assert isinstance(messages, list), "Flower iterates over the messages twice"
        return [self._push(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        assert isinstance(message_ids, list)
        ready = [i for i in message_ids if i in self._replies and self._replies[i][0] <= self.clock()]
        pulled = [self._replies.pop(message_id)[1] for message_id in ready]
        self.most_adapters_pulled = max(self.most_adapters_pulled, sum(map(_brings_an_adapter, pulled)))
        return pulled

    def _push(self, message: Message) -> str:
        node, kind = message.metadata.dst_node_id, message.metadata.message_type
        self.pushed.append((node, kind))
        message.metadata.__dict__["_message_id"] = message_id = message.object_id
        codes = self.errors.get(kind, [])
        if codes:
            reply = Message(Error(codes.pop(0), "injected"), reply_to=message)
        elif node in self.silent or node not in self.nodes:
            return message_id
        else:
            reply = self._run(message)
        reply.metadata.__dict__["_src_node_id"] = 1 if reply.has_error() else node
        self._replies[message_id] = (self.clock() + self.latency, reply)
        here = sum(_brings_an_adapter(waiting) for _, waiting in self._replies.values())
        self.most_adapters = max(self.most_adapters, here)
        return message_id

    def _run(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        context = Context(1, node, {"socket": str(self.nodes[node])}, RecordDict(), {})
        return _over_the_wire(app(_over_the_wire(message), context))


def _brings_an_adapter(message: Message) -> bool:
    return message.has_content() and "adapter" in message.content


def _over_the_wire(message: Message) -> Message:
    contents = {object_id: item.deflate() for object_id, item in get_all_nested_objects(message).items()}
    copy = inflate_object_from_contents(message.object_id, contents)
    copy.metadata.__dict__["_message_id"] = message.metadata.message_id
    return copy
