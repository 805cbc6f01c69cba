"""Runs of several adapters at once over one registry, each in a process of its own, and operators beside them."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from server import orders
from server.registry import retention, views
from server.registry.events import EVENTS, Events
from server.registry.registry import AdapterRegistry
from server.registry.round_log import RoundState
from tests.toys.several_runs import Run
from umbel.adapter import AdapterRef

ADAPTERS = ("billing", "support", "triage")
ROUNDS = 3


def test_runs_at_once_lose_nothing_of_each_other_from_the_registrys_first_moment(tmp_path: Path) -> None:
    root = tmp_path / "registry"
    runs = [Run(root, name, ROUNDS) for name in ADAPTERS]
    for run in runs:
        run.wait_ready()
    for run in runs:
        run.go()
    swept = 0
    while not all(run.over for run in runs):  # an operator works beside them
        time.sleep(0.2)
        registry = AdapterRegistry(root, create=True)
        retention.collect(registry, who="eva", why="room", drop_ancestors=True)
        assert not [lost for lost in registry.reindex() if "not listed" in lost]
        swept += 1
        registry.close()
    assert [run.end() for run in runs] == [(0, "")] * len(runs)
    assert swept > 2
    registry = AdapterRegistry(root)
    assert registry.names() == list(ADAPTERS)
    for name in ADAPTERS:
        assert [str(manifest.ref) for manifest in registry.versions(name)] == [
            f"{name}@v{n}" for n in range(ROUNDS + 1)
        ]
        assert [record.state for record in registry.rounds.all(name)] == [RoundState.PROMOTED] * ROUNDS
        assert registry.aliases(name) == dict.fromkeys(("head", "live"), AdapterRef(name, ROUNDS))
    assert views.verify(registry) == {"versions": len(ADAPTERS) * (ROUNDS + 1), "damages": []}
    lines = [json.loads(line) for line in (root / EVENTS).read_text().splitlines()]
    told = Counter((event["adapter"], event["event"]) for event in lines)
    for name in ADAPTERS:
        assert told[name, "round.promoted"] == told[name, "round.published"] == ROUNDS
        assert told[name, "site.trained"] == 2 * ROUNDS
        assert told[name, "run.finished"] == 1


def test_two_runs_of_one_adapter_exclude_each_other(tmp_path: Path) -> None:
    root = tmp_path / "registry"
    runs = [Run(root, "support", 4) for _ in range(2)]
    for run in runs:
        run.wait_ready()
    for run in runs:
        run.go()
    ends = sorted(run.end() for run in runs)
    assert [status for status, _ in ends] == [0, 1]
    assert "another run works on support; wait for it, or stop it with `flwr stop`" in ends[1][1]
    assert len(AdapterRegistry(root).versions("support")) == 5


def at_once(work: Callable[[int], None], threads: int = 4) -> None:
    """Call `work` with 0, 1 … in threads that begin together."""
    barrier = threading.Barrier(threads)

    def begin(number: int) -> None:
        barrier.wait()
        work(number)

    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(begin, number) for number in range(threads)]:
            done.result()


def test_each_event_is_a_whole_line_whoever_else_writes(tmp_path: Path) -> None:
    path = tmp_path / EVENTS
    path.write_text('{"event": "round.star')  # a kill cut it short

    def write(writer: int) -> None:
        for number in range(50):
            Events(path).emit("round.failed", adapter=f"a{writer}", round=number, reasons={"a": "x" * 20_000})

    at_once(write)
    torn, *lines = path.read_text().split("\n")
    assert torn == '{"event": "round.star'
    assert lines.pop() == ""
    assert Counter(json.loads(line)["adapter"] for line in lines) == {f"a{n}": 50 for n in range(4)}


def test_runs_that_make_the_key_of_nonces_at_once_use_the_same(tmp_path: Path) -> None:
    for attempt in range(10):
        path, keys = tmp_path / f"{attempt}.key", []
        at_once(lambda _, path=path, keys=keys: keys.append(orders._nonce_key(path)))
        assert keys == [path.read_bytes()] * 4
    assert len(list(tmp_path.iterdir())) == 10, "nothing is left of those that came second"
