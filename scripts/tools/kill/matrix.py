"""Kills a real site and a real centre at every step of a version's life, and checks which version answers afterwards.

    scripts/kill_matrix [--minutes 45] [--only site engine centre] [--points load.begun reject.told]

One tiny site (SGLang on the CPU), one user who never stops asking, Flower and a registry. Each death is one of the site
daemon, of the engine alone, or of the ServerApp. A start is the recovery of one death and the beginning of the next.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from scripts.tools.kill.centre import Centre
from scripts.tools.kill.report import Row, write
from scripts.tools.kill.site import Site
from scripts.tools.processes import ProcessError, Processes, end_as_ctrl_c
from scripts.tools.repository import REPOSITORY
from scripts.tools.trial_site import require_done, wait_until
from umbel.adapter import Personal
from umbel.faults import Point

FIRST_VERSION = 100
"""Versions from here on are pushed without a centre; the registry's numbers are below."""


@dataclass(frozen=True)
class Case:
    """A fault point, and the operation in which the site dies there."""

    point: Point
    story: Callable[["Stories"], object]
    takes_effect: bool = False
    """The journal has the change before the point, so that it holds after the death."""

    def leaves_work_for(self, following: "Case") -> bool:
        """Tell whether the recovery from this death would itself reach the following point."""
        versions = (Stories.deploy, Stories.reject)
        same_way = self.story is following.story or {self.story, following.story} <= {*versions}
        return same_way and not self.takes_effect


class Stories:
    """Operations that the centre and operators ask of a site; `effect` is the version that answers afterwards."""

    def __init__(self, site: Site) -> None:
        self.site, self._version, self._round = site, FIRST_VERSION, 1000
        self.effect = self.settled_on = "base"

    def deploy(self) -> None:
        """Push a new version and promote it."""
        self._version += 1
        self.effect = f"support@v{self._version}"
        require_done(self.site.promote(self.site.offer_slight(self._version)))

    def reject(self) -> None:
        """Push a new version and discard it."""
        self._version += 1
        self.effect = self.settled_on
        require_done(self.site.discard(self.site.offer_slight(self._version)))

    def roll_back(self) -> None:
        """Go back to the version that answered before."""
        self.effect = str(self.site.status()["aliases"]["support"]["previous"] or "base")
        require_done(self.site.roll_back())

    def train(self) -> None:
        """Train a round with a personal part."""
        self._round += 1
        self.effect = self.settled_on
        self.site.train(self._round, Personal(part="B"))


P = Point
# Operations on versions and on rounds alternate: one start then recovers from a death and is set for the next one.
SITE = [
    Case(P.PROMOTE_JOURNALLED, Stories.deploy, True), Case(P.PROMOTE_WRITTEN, Stories.deploy, True),
    Case(P.PROMOTE_TOLD, Stories.deploy, True), Case(P.ROLL_BACK_JOURNALLED, Stories.roll_back, True),
    Case(P.RECEIVE_JOURNALLED, Stories.deploy), Case(P.UPDATE_WRITTEN, Stories.train),
    Case(P.LOAD_BEGUN, Stories.deploy), Case(P.ROUND_DONE, Stories.train),
    Case(P.SHADOW_JOURNALLED, Stories.deploy), Case(P.PART_KEPT, Stories.train),
    Case(P.JUDGE_DECIDED, Stories.deploy), Case(P.ROLL_BACK_TOLD, Stories.roll_back, True),
    Case(P.PROMOTE_BEGUN, Stories.deploy), Case(P.REJECT_JOURNALLED, Stories.reject),
    Case(P.RETIRE_UNLOADED, Stories.reject), Case(P.RECEIVE_WRITTEN, Stories.deploy),
    Case(P.SUBMIT_WRITTEN, Stories.train), Case(P.LOAD_DONE, Stories.deploy), Case(P.SUBMIT_JOURNALLED, Stories.train),
    Case(P.SHADOW_BEGUN, Stories.deploy), Case(P.ATTEMPT_BEGUN, Stories.train), Case(P.SHADOW_WRITTEN, Stories.deploy),
    Case(P.ROLL_BACK_BEGUN, Stories.roll_back), Case(P.SHADOW_TOLD, Stories.deploy),
    Case(P.ROLL_BACK_WRITTEN, Stories.roll_back, True), Case(P.JUDGE_JOURNALLED, Stories.deploy),
    Case(P.REJECT_BEGUN, Stories.reject), Case(P.RETIRE_BEGUN, Stories.reject),
    Case(P.REJECT_WRITTEN, Stories.reject), Case(P.RETIRE_REMOVED, Stories.reject),
    Case(P.REJECT_TOLD, Stories.reject),
]  # fmt: skip
# All in one run of the daemon. Loads come first: each death of the engine causes more of them.
ENGINE = [
    Case(P.LOAD_BEGUN, Stories.deploy, True), Case(P.LOAD_DONE, Stories.deploy, True),
    *(Case(point, Stories.deploy, True) for point in (
        P.PROMOTE_BEGUN, P.PROMOTE_JOURNALLED, P.PROMOTE_WRITTEN, P.PROMOTE_TOLD)),
    *(Case(point, Stories.roll_back, True) for point in (P.ROLL_BACK_JOURNALLED, P.ROLL_BACK_TOLD)),
    Case(P.ATTEMPT_BEGUN, Stories.train), Case(P.UPDATE_WRITTEN, Stories.train),
    *(Case(point, Stories.deploy, True) for point in (
        P.SHADOW_JOURNALLED, P.JUDGE_DECIDED, P.RETIRE_BEGUN, P.RETIRE_UNLOADED, P.SHADOW_BEGUN, P.SHADOW_WRITTEN,
        P.SHADOW_TOLD, P.JUDGE_JOURNALLED, P.RECEIVE_WRITTEN, P.RECEIVE_JOURNALLED, P.RETIRE_REMOVED)),
    *(Case(point, Stories.roll_back, True) for point in (P.ROLL_BACK_BEGUN, P.ROLL_BACK_WRITTEN)),
    *(Case(point, Stories.train) for point in (P.ROUND_DONE, P.PART_KEPT, P.SUBMIT_WRITTEN, P.SUBMIT_JOURNALLED)),
    *(Case(point, Stories.reject) for point in (P.REJECT_BEGUN, P.REJECT_JOURNALLED, P.REJECT_WRITTEN, P.REJECT_TOLD)),
]  # fmt: skip
KINDS = ("site", "engine", "centre")
STARTS_ONLY = (P.SWEPT, P.DAMAGE_FORGOTTEN)


def main() -> int:
    """Kill, recover and write the table; return 1 if anything did not recover as it had to."""
    parser = argparse.ArgumentParser(prog="scripts/kill_matrix", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=45.0, help="begin no further death after these (default 45)")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS)
    points = [case.point for case in SITE]
    parser.add_argument("--points", nargs="+", choices=points, default=points, help="of site and engine; default: all")
    options = parser.parse_args()
    from scripts.tools import tiny_base

    end_as_ctrl_c()
    model = tiny_base.build(REPOSITORY / ".cache" / "tiny-base")
    folder = Path(tempfile.mkdtemp(prefix="umbel-"))
    processes = Processes(folder / "logs")
    rows: list[Row] = []
    matrix = Matrix(Site(folder / "site", model, processes), processes, options.points)
    began = time.monotonic()
    try:
        for index, name in enumerate(options.only, start=1):
            matrix.deadline = began + 60 * options.minutes * index / len(options.only)
            if time.monotonic() > matrix.deadline:
                continue  # the deaths before took the time of these
            for row in getattr(matrix, name)():
                print(row, flush=True)
                rows.append(row)
    finally:
        processes.stop()
        cases = len(Centre.POINTS) + len(SITE) + len(ENGINE) + len(STARTS_ONLY)
        write(REPOSITORY / "docs" / "operations.md", rows, cases)
    if rows and all(row.recovered for row in rows):
        shutil.rmtree(folder)
        return 0
    print(f"logs: {processes.logs}", flush=True)
    return 1


class Matrix:
    """All deaths, by the kind of process; each method yields a row per death."""

    def __init__(self, site: Site, processes: Processes, points: Collection[str]) -> None:
        self._site, self._processes = site, processes
        self._stories = Stories(site)
        self._of_site = [case for case in SITE if case.point in points]
        self._of_engine = [case for case in ENGINE if case.point in points]
        self.deadline = 0.0
        """No further death begins after this time (time.monotonic)."""

    def centre(self) -> Iterator[Row]:
        """Kill the ServerApp at each step of a round; the next run takes the round up."""
        self._begin("")
        centre = Centre(self._site, self._processes)
        for point in Centre.POINTS:
            if time.monotonic() > self.deadline:
                break
            began = time.monotonic()
            try:
                died = centre.die_at(point)
            except ProcessError as error:
                print(f"{point}: {error}", flush=True)
                died = False
            answers, right = self._answer(time.monotonic(), centre.live or self._stories.settled_on)
            yield Row(point, "ServerApp", right and died, self._silence(began), answers)
        centre.finish()
        self._stories.settled_on = self._site.live()

    def engine(self) -> Iterator[Row]:
        """Kill the engine alone: the daemon starts it again and completes what was asked for."""
        self._begin("")
        self._need_a_version_before()
        self._begin(",".join(f"{point}:{time}@engine" for point, time in self._plan()))
        for case in self._of_engine:
            if time.monotonic() > self.deadline:
                break
            began, starts = time.monotonic(), self._site.starts()
            try:
                case.story(self._stories)
                self._site.wait_ready(starts + 1)
                wait_until(self._site.settled, "what was asked for")
            except (ProcessError, httpx.HTTPError) as error:
                print(f"{case.point}@engine: {error}", flush=True)
            answers, right = self._answer(time.monotonic(), self._stories.effect)
            right = right and self._site.starts() == starts + 1
            self._stories.settled_on = answers
            yield Row(case.point, "engine", right, self._silence(began), answers)

    def _plan(self) -> Iterator[tuple[Point, int]]:
        """Yield each point with the number of times that it will have been reached when its case comes."""
        stories = (Stories.deploy, Stories.roll_back, Stories.train, Stories.reject)
        told: dict[Callable[[Stories], object], int] = dict.fromkeys(stories, 0)
        for case in self._of_engine:
            told[case.story] += 1
            yield case.point, told[case.story]

    def site(self) -> Iterator[Row]:
        """Kill the daemon, and its engine with it: the next daemon recovers."""
        yield from self._starts()
        self._begin(self._of_site[0].point)
        for case, following in zip(self._of_site, [*self._of_site[1:], None], strict=True):
            began = time.monotonic()
            done = following is None or began > self.deadline
            try:
                with suppress(httpx.TransportError):
                    case.story(self._stories)
                self._site.wait_dead()
                expected = self._stories.effect if case.takes_effect else self._stories.settled_on
            except ProcessError as error:
                print(f"{case.point}: {error}", flush=True)
                expected = "a death that did not happen"
                self._processes.kill("serve")
            at_once = following is not None and not done and not case.leaves_work_for(following)
            self._site.start(following.point if following is not None and at_once else "")
            yield self._back(case.point, began, expected)
            if done:
                break
            if following is not None and not at_once:
                self._begin(following.point)

    def _starts(self) -> Iterator[Row]:
        """Kill the daemon within a recovery of a site that has a live version and one before it."""
        self._begin("")
        self._need_a_version_before()
        for point in STARTS_ONLY:
            began, expected = time.monotonic(), self._stories.settled_on
            before = self._previous()
            self._processes.kill("serve")
            if point is P.DAMAGE_FORGOTTEN:
                expected = before
                self._spoil()
            self._site.start(point)
            self._site.wait_dead()
            self._site.start()
            yield self._back(point, began, expected)

    def _need_a_version_before(self) -> None:
        while self._site.live() == "base" or self._previous() == "base":
            self._stories.deploy()
        self._stories.settled_on = self._site.live()

    def _previous(self) -> str:
        return str(self._site.status()["aliases"]["support"]["previous"] or "base")

    def _spoil(self) -> None:
        """Damage the live version's weights; the version before it has to answer."""
        name = self._stories.settled_on.replace("@", "-")
        weights = self._site.state_dir / "adapters" / name / "adapter_model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)

    def _back(self, point: Point, began: float, expected: str) -> Row:
        try:
            self._site.wait_ready()
            answers, right = self._answer(time.monotonic(), expected)
            wait_until(self._site.settled, "what was cut off")
        except ProcessError as error:
            print(f"{point}: {error}", flush=True)
            answers, right = "nobody", False
        self._stories.settled_on = answers
        return Row(point, "site", right, self._silence(began), answers)

    def _begin(self, die_at: str) -> None:
        """Start a daemon with this plan, in place of the one that may be running."""
        with suppress(KeyError):
            self._processes.kill("serve")
        self._site.start(die_at)
        self._site.wait_ready()
        wait_until(self._site.settled, "what was cut off")
        self._stories.settled_on = self._site.live()

    def _answer(self, since: float, expected: str) -> tuple[str, bool]:
        """Return the version that answered the user last, and whether it and the site's live version are `expected`."""
        wait_until(lambda: self._site.user.answered_since(since), "an answer")
        answers = self._site.user.answered_since(since)[-1][1]
        return answers, answers == expected == self._site.live()

    def _silence(self, began: float) -> float:
        return self._site.user.longest_silence(began, time.monotonic())


if __name__ == "__main__":
    sys.exit(main())
