"""One site that trains alone: the real loop and registry over a toy site's socket, without Flower or a clock.

As a module it runs a life that dies at a fault point, over a site that lives on in another process.
"""

from collections.abc import Callable
from pathlib import Path

from server.alone import Alone, Direct
from server.config import ALONE, RunConfig, defaults
from server.registry.events import EVENTS, EventReader, Events
from server.registry.registry import AdapterRegistry
from server.registry.round_log import RoundRecord
from tests.toys.rehearsal import rehearse
from umbel.site.calls import SiteCalls


class Clock:
    """Time that passes only when someone sleeps; `woken` is called then."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.woken: Callable[[], None] = lambda: None

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.woken()


class AloneAt:
    """`umbel adapt` at a socket; each `start` runs it as a new process would, over the same registry."""

    def __init__(self, root: Path, socket: Path) -> None:
        self.root, self.socket = root, socket
        self.clock = Clock()
        self.pauses: list[float] = []
        """Seconds until the next round, after each."""

    def start(self, run_id: str = "one", **settings: object) -> list[RoundRecord]:
        """Run the rounds (2, where `rounds` says nothing else); return how each ended."""
        run = RunConfig.of(
            {**defaults(), "registry": str(self.root), "strategy": ALONE, "quorum": 1, "rounds": 2, "rank": 2,
             "steps": 4, "round-seconds": 60.0, "grace-seconds": 60.0, **settings}
        )  # fmt: skip
        registry = AdapterRegistry(self.root, create=True)
        ends = []
        with SiteCalls(self.socket) as calls:
            site = Direct(calls, run.adapter, clock=self.clock, sleep=self.clock.sleep)
            alone = Alone(run, registry, site, Events(self.root / EVENTS, clock=self.clock), run_id)
            for record in alone.rounds():
                ends.append(record)
                self.pauses.append(alone.pause_s)
        registry.close()
        return ends

    def told(self, kind: str) -> list[dict]:
        """The events of one kind."""
        return [event for event in EventReader(self.root / EVENTS).read() if event["event"] == kind]


if __name__ == "__main__":
    rehearse(lambda root, socket: AloneAt(Path(root), Path(socket)).start() and None)
