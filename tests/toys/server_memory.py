"""Measure the memory of a round at the centre: one whole round with many sites, in a process of its own.

    python tests/toys/server_memory.py STRATEGY SITES

Prints one line of JSON: `peak`, the bytes that the round added at its peak to what the process took with everything
imported (resident set), `adapter`, the bytes of one update, and `sites`, how many are in the version. The sites live in
this process, but keep nothing: what one sends is made when it is pulled, as if it came from the network.
"""

import argparse
import json
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from server.app import return_large_blocks
from server.config import RunConfig
from server.exchange import Exchange
from server.federation import Federation
from server.loop import run
from server.registry.events import EVENTS, Events
from server.registry.registry import AdapterRegistry
from strategies import catalogue
from strategies.records import pack, unpack, unpack_adapter
from tests.toys.federation import SETTINGS
from tests.toys.grid import Clock, ToyGrid
from tests.toys.site import BASE
from umbel import peft_dir
from umbel.adapter import Lifecycle
from umbel.messages import (
    Hello,
    JobState,
    Restore,
    Restored,
    RoundOrder,
    RoundQuery,
    RoundReport,
    Shadow,
    ShadowReport,
    Submit,
    Verdict,
    VersionQuery,
)

RANK = 8
SHAPES = {
    f"model.layers.{layer}.self_attn.{name}": (4096, 4096) for layer in range(12) for name in ("q_proj", "v_proj")
}


class Crowd(ToyGrid):
    """Sites that exist only as numbers; each adds noise of its own to B."""

    def __init__(self, clock: Clock, sites: int) -> None:
        super().__init__(clock, {node: Path(str(node)) for node in range(1, sites + 1)})
        self._waiting: dict[str, tuple[float, Callable[[], Message]]] = {}
        self._order: RoundOrder | None = None
        self._parent = b""
        self._live: str | None = None

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return [self._take(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        ready = [key for key in message_ids if key in self._waiting and self._waiting[key][0] <= self.clock()]
        return [self._waiting.pop(key)[1]() for key in ready]

    def _take(self, message: Message) -> str:
        kind, content, node = message.metadata.message_type, message.content, message.metadata.dst_node_id
        message.metadata.__dict__["_message_id"] = key = f"{kind}-{node}-{len(self.pushed)}"
        self.pushed.append((node, kind))
        if kind == "train.submit":
            self._order, self._parent = unpack(content, Submit).order, unpack_adapter(content) or b""
        empty = Message(RecordDict(), node, kind)  # a reply needs its message only for the address
        empty.metadata.__dict__["_message_id"] = key
        asked = dict(content) if kind != "train.submit" else {}
        self._waiting[key] = (self.clock() + 1, lambda: Message(self._answer(kind, node, asked), reply_to=empty))
        return key

    def _answer(self, kind: str, node: int, asked: dict[str, object]) -> RecordDict:
        content = RecordDict({name: record for name, record in asked.items() if name == "body"})
        if kind == "query.hello":
            return pack(self._hello(node))
        if kind == "train.submit":
            return pack(self._report(JobState.RUNNING))
        if kind == "query.shadow":
            return pack(self._judged(str(unpack(content, Shadow).manifest.ref), Lifecycle.JUDGED))
        if kind == "query.restore":
            self._live = unpack(content, Restore).ref
            return pack(Restored(live=self._live, state=Lifecycle.LIVE))
        if kind == "query.promote":
            self._live = unpack(content, VersionQuery).ref
            return pack(self._judged(unpack(content, VersionQuery).ref, Lifecycle.LIVE))
        fetch = unpack(content, RoundQuery).fetch
        update = self._update(node) if fetch else None
        return pack(self._report(JobState.DONE, update), update)

    def _hello(self, node: int) -> Hello:
        return Hello(
            site=f"site-{node}", adapter="support", fingerprint=BASE, shapes=SHAPES, dtype="float32",
            max_lora_rank=RANK, train_examples=10, eval_examples=5, live=self._live,
        )  # fmt: skip

    def _report(self, state: JobState, update: bytes | None = None) -> RoundReport:
        assert self._order is not None
        return RoundReport(
            key=self._order.key, state=state, parent=self._order.parent, steps=1, num_examples=8,
            num_loss_tokens=100, held_examples=8, held_loss_tokens=100, loss_sum=1.0,
            update=None if update is None else peft_dir.digest(update),
        )  # fmt: skip

    def _judged(self, ref: str, state: Lifecycle) -> ShadowReport:
        return ShadowReport(ref=ref, state=state, verdict=Verdict(accepted=True, reasons=()))

    def _update(self, node: int) -> bytes:
        generator = np.random.default_rng(node)
        tensors = peft_dir.decode(self._parent)
        for name in tensors:
            if ".lora_B." in name:
                noise = generator.standard_normal(tensors[name].shape, dtype=np.float32)
                tensors[name] = tensors[name] + np.float32(0.01) * noise
        return peft_dir.encode(tensors)


def peak_bytes() -> int:
    """Return the largest resident set since `reset_peak`, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def reset_peak() -> int:
    """Reset the peak; return the resident set now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("strategy")
    parser.add_argument("sites", type=int)
    options = parser.parse_args()
    return_large_blocks()
    for name in ("_task_id", "_run_id", "_node_id"):
        setattr(TaskIdentity, name, 1)
    clock = Clock()
    grid = Crowd(clock, options.sites)
    with tempfile.TemporaryDirectory(prefix="umbel-") as folder:
        config = RunConfig.of(
            {**SETTINGS, "registry": folder, "strategy": options.strategy, "rounds": 1, "rank": RANK,
             "quorum": options.sites, "round-seconds": 3600.0}
        )  # fmt: skip
        registry = AdapterRegistry(config.registry, create=True)
        exchange = Exchange(grid, "support", clock=clock, sleep=clock.sleep)
        before = reset_peak()
        strategy = catalogue.find(config.strategy)(**config.options)
        run(Federation(config, registry, exchange, Events(config.registry / EVENTS, clock=clock), "one", strategy))
        peak = peak_bytes() - before
        head = registry.resolve("support@live")
        blob, manifest = registry.read(head)
    print(json.dumps({"peak": peak, "adapter": len(blob), "sites": len(manifest.weights)}))


if __name__ == "__main__":
    main()
