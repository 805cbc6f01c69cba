"""`Point`, `reach`: named places at which a process can be made to die as in a power cut, to rehearse recovery.

    UMBEL_DIE_AT=promote.journalled umbel serve site.toml            the first time that line is reached
    UMBEL_DIE_AT=promote.told:3 …                                    the third time
    UMBEL_DIE_AT=load.begun@engine,promote.told@engine …             the site's engine dies there, the daemon lives on

It is part of the product so that operators can rehearse recovery at their own site, with their own disks, base and
supervisor, before they need it. The process ends by SIGKILL: nothing is flushed, no `finally` runs. Without the
variable a point costs one look into the environment.
"""

import logging
import os
import signal
from collections import Counter
from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple

from umbel.errors import ConfigError

VARIABLE = "UMBEL_DIE_AT"


class Point(StrEnum):
    """Every fault point. A transition has one before it, and one after each file, row or call that it makes."""

    # At a site: a version is received, loaded and judged.
    RECEIVE_WRITTEN = "receive.written"  # its files are there, the journal does not know it
    RECEIVE_JOURNALLED = "receive.journalled"
    LOAD_BEGUN = "load.begun"  # the next call is the engine's
    LOAD_DONE = "load.done"
    JUDGE_DECIDED = "judge.decided"  # the verdict is in memory only
    JUDGE_JOURNALLED = "judge.journalled"
    # At a site: an alias moves. First in the journal, then in `aliases.json`, then in the router.
    SHADOW_BEGUN = "shadow.begun"
    SHADOW_JOURNALLED = "shadow.journalled"
    SHADOW_WRITTEN = "shadow.written"
    SHADOW_TOLD = "shadow.told"
    PROMOTE_BEGUN = "promote.begun"
    PROMOTE_JOURNALLED = "promote.journalled"
    PROMOTE_WRITTEN = "promote.written"
    PROMOTE_TOLD = "promote.told"
    ROLL_BACK_BEGUN = "roll-back.begun"
    ROLL_BACK_JOURNALLED = "roll-back.journalled"
    ROLL_BACK_WRITTEN = "roll-back.written"
    ROLL_BACK_TOLD = "roll-back.told"
    REJECT_BEGUN = "reject.begun"
    REJECT_JOURNALLED = "reject.journalled"
    REJECT_WRITTEN = "reject.written"
    REJECT_TOLD = "reject.told"
    # At a site: a version that no request can name any more is removed.
    RETIRE_BEGUN = "retire.begun"
    RETIRE_UNLOADED = "retire.unloaded"
    RETIRE_REMOVED = "retire.removed"
    # At a site: an adapter that is only served is loaded, or another one under its name, or none any more.
    IMPORT_WRITTEN = "import.written"  # its files are there, the journal does not know it
    SERVE_BEGUN = "serve.begun"
    SERVE_JOURNALLED = "serve.journalled"
    SERVE_WRITTEN = "serve.written"
    SERVE_TOLD = "serve.told"
    UNSERVE_BEGUN = "unserve.begun"
    UNSERVE_JOURNALLED = "unserve.journalled"
    UNSERVE_WRITTEN = "unserve.written"
    UNSERVE_TOLD = "unserve.told"
    # At a site: a round of training.
    SUBMIT_WRITTEN = "submit.written"  # the parent is there, the journal does not know the round
    SUBMIT_JOURNALLED = "submit.journalled"
    ATTEMPT_BEGUN = "attempt.begun"
    UPDATE_WRITTEN = "update.written"  # trained; the journal still has the round as open
    ROUND_DONE = "round.done"
    PART_KEPT = "part.kept"  # the personal part was replaced, the round's copy of it is still there
    # At a site: recovery itself.
    DAMAGE_FORGOTTEN = "damage.forgotten"
    SWEPT = "swept"  # before the first start of the engine
    # At the centre: an adapter is begun.
    BEGIN_PINNED = "begin.pinned"
    # At the centre: a round.
    ROUND_RECORDED = "round.recorded"
    BLOB_WRITTEN = "publish.blob"
    VERSION_RENAMED = "publish.renamed"
    VERSION_LISTED = "publish.listed"  # in the index, within a transaction that is not committed
    VERSION_PUBLISHED = "publish.committed"
    VERDICT_RECORDED = "verdict.recorded"  # PROMOTING or DISCARDING
    SITES_PROMOTED = "promote.sites"
    ALIASES_MOVED = "accept.moved"  # in the alias log, the round is not closed yet
    ROUND_ACCEPTED = "accept.committed"
    SITES_DISCARDED = "discard.sites"
    ROUND_REJECTED = "discard.recorded"
    # At the centre: gc.
    GC_MARKED = "gc.marked"  # `pruned.json` says that the weights are gone, and they are not
    GC_UNLINKED = "gc.unlinked"
    GC_REMOVED = "gc.removed"


class AliasChange(NamedTuple):
    """The four points of one move of an alias at a site."""

    begun: Point
    journalled: Point
    written: Point
    told: Point


SHADOW = AliasChange(Point.SHADOW_BEGUN, Point.SHADOW_JOURNALLED, Point.SHADOW_WRITTEN, Point.SHADOW_TOLD)
PROMOTE = AliasChange(Point.PROMOTE_BEGUN, Point.PROMOTE_JOURNALLED, Point.PROMOTE_WRITTEN, Point.PROMOTE_TOLD)
ROLL_BACK = AliasChange(
    Point.ROLL_BACK_BEGUN, Point.ROLL_BACK_JOURNALLED, Point.ROLL_BACK_WRITTEN, Point.ROLL_BACK_TOLD
)
REJECT = AliasChange(Point.REJECT_BEGUN, Point.REJECT_JOURNALLED, Point.REJECT_WRITTEN, Point.REJECT_TOLD)
SERVE = AliasChange(Point.SERVE_BEGUN, Point.SERVE_JOURNALLED, Point.SERVE_WRITTEN, Point.SERVE_TOLD)
UNSERVE = AliasChange(Point.UNSERVE_BEGUN, Point.UNSERVE_JOURNALLED, Point.UNSERVE_WRITTEN, Point.UNSERVE_TOLD)

logger = logging.getLogger(__name__)

_reached: Counter[Point] = Counter()
_kill_engine: list[Callable[[], None]] = []


def reach(point: Point) -> None:
    """Die here if UMBEL_DIE_AT says so, otherwise do nothing; raise ConfigError when it names an unknown point."""
    plan = os.environ.get(VARIABLE)
    if plan is None:
        return
    _reached[point] += 1
    for wanted, time, engine in map(_parse, plan.split(",")):
        if (wanted, time) != (point, _reached[point]):
            continue
        if not engine:
            os.kill(os.getpid(), signal.SIGKILL)
        logger.warning("faults.engine_killed at=%s", point)
        for kill in _kill_engine:
            kill()


def kill_engine_with(kill: Callable[[], None]) -> None:
    """Register the function that kills the current engine, for points with `@engine`; it replaces an earlier one."""
    _kill_engine[:] = [kill]


def _parse(entry: str) -> tuple[Point, int, bool]:
    """Read `promote.told:3@engine` as (point, number of times it has to be reached, True for the engine)."""
    what, _, who = entry.strip().partition("@")
    name, _, time = what.partition(":")
    if name not in Point.__members__.values() or who not in ("", "engine") or not (time or "1").isdecimal():
        raise ConfigError(
            f"{VARIABLE}={entry}: not a fault point; write POINT, POINT:TIMES or POINT@engine, where POINT is one of "
            + ", ".join(Point)
        )
    return Point(name), int(time or 1), who == "engine"
