"""`Centre`: a real centre that is killed at fault points, for scripts/tools/kill/matrix.py."""

import os
import time

from scripts.tools.kill.site import Site
from scripts.tools.processes import Flower, Processes
from scripts.tools.repository import REPOSITORY
from scripts.tools.trial_site import RANK, wait_until
from server.bundle import export
from server.registry.events import EVENTS, EventReader
from umbel.faults import VARIABLE, Point

P = Point


class Centre:
    """Flower in its durable form, one site, and a registry. The SuperExec passes the fault point to the ServerApp."""

    POINTS = (
        P.BEGIN_PINNED, P.BLOB_WRITTEN, P.VERSION_RENAMED, P.ALIASES_MOVED,  # of the untrained adapter
        P.ROUND_RECORDED, P.VERSION_PUBLISHED, P.VERDICT_RECORDED, P.SITES_PROMOTED, P.ROUND_ACCEPTED,
        P.VERSION_LISTED,  # of the second round
    )  # fmt: skip

    def __init__(self, site: Site, processes: Processes) -> None:
        self._site, self._processes = site, processes
        self._flower = Flower(processes, site.folder.parent / "flower", durable=True)
        self._registry = site.folder.parent / "registry"
        self._app = export(REPOSITORY, site.folder.parent / "app")
        self._flower.start_superlink()
        self._flower.start_supernode("clinic-a", site.file)
        self._started = False
        self.live = ""
        """The version that the federation has promoted at the site; empty before the first."""

    def die_at(self, point: Point) -> bool:
        """Run a round, or the rest of one, until the ServerApp dies; return whether it died there and nowhere else."""
        self._run(point)
        wait_until(lambda: self._processes.find("flwr-serverapp"), "the ServerApp's start")
        wait_until(lambda: not self._processes.find("flwr-serverapp"), f"the ServerApp's death at {point}")
        if point is P.SITES_PROMOTED:
            self.live = "support@v1"
        return self._reached(point)

    def finish(self) -> None:
        """Run until the last round is promoted and the run has ended, so that nothing more is asked of the site."""
        promoted, ended = len(self._events("round.promoted")), len(self._events("run.finished"))
        self._run("")
        wait_until(lambda: len(self._events("round.promoted")) > promoted, "a round that is promoted")
        wait_until(lambda: len(self._events("run.finished")) > ended, "the run's end")

    def _reached(self, point: Point) -> bool:
        """Tell whether all that comes before the point is there, and nothing of what comes after it."""
        adapter = self._registry / "support"
        moves = (adapter / "aliases.jsonl").read_text().count("\n") if (adapter / "aliases.jsonl").exists() else 0
        there = {version: (adapter / f"v{version:06d}").exists() for version in range(3)}
        seen = {kind: len(self._events(f"round.{kind}")) for kind in ("started", "published", "judged", "promoted")}
        facts: dict[Point, bool] = {
            P.BEGIN_PINNED: (adapter / "pin.json").exists() and not (self._registry / "blobs").exists(),
            P.BLOB_WRITTEN: (self._registry / "blobs").exists() and not there[0],
            P.VERSION_RENAMED: there[0] and moves == 0,
            P.ALIASES_MOVED: moves == 1 and not seen["started"],
            P.ROUND_RECORDED: moves == 1 and not seen["started"],
            P.VERSION_PUBLISHED: there[1] and not seen["published"],
            P.VERDICT_RECORDED: there[1] and not seen["judged"],
            P.SITES_PROMOTED: self._site.live() == "support@v1" and moves == 1,
            P.ROUND_ACCEPTED: moves == 2 and not seen["promoted"],
            P.VERSION_LISTED: there[2] and moves == 2,
        }
        return facts[point]

    def _run(self, die_at: str) -> None:
        if self._started:
            self._processes.kill("flower-superexec")
        os.environ[VARIABLE] = die_at
        try:
            if not die_at:
                del os.environ[VARIABLE]
            self._flower.start_superexec()
        finally:
            os.environ.pop(VARIABLE, None)
        self._started = True
        settings = {
            "registry": self._registry, "rounds": 1, "quorum": 1, "rank": RANK, "steps": 2, "round-seconds": 60.0,
            "straggler-seconds": 0.0, "grace-seconds": 120.0,
        }  # fmt: skip
        submitted = self._flower.run(self._app, settings, stream=False)
        submitted.wait(120)
        time.sleep(0.1)

    def _events(self, kind: str) -> list[dict[str, object]]:
        return [event for event in EventReader(self._registry / EVENTS).read() if event["event"] == kind]
