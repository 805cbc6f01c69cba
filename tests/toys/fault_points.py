"""Fault points at which tests kill a process, and the state that has to follow. Every fault point is in here."""

from umbel.faults import Point

V1, V2, V3 = (f"support@v{version}" for version in (1, 2, 3))

BEFORE_V1, AFTER_V1, ON_BASE = (None, None), (V1, None), (None, V1)
BEFORE_V3, AFTER_V3, BACK = (V2, V1), (V3, V2), (V2, V3)

Ends = tuple[str | None, str | None]
"""(live, previous) from then on."""
SITE: dict[str, Ends] = {
    **{f"{point}{time}": ends for point in (
        Point.RECEIVE_WRITTEN, Point.RECEIVE_JOURNALLED, Point.LOAD_BEGUN, Point.LOAD_DONE, Point.SHADOW_BEGUN,
        Point.SHADOW_JOURNALLED, Point.SHADOW_WRITTEN, Point.SHADOW_TOLD, Point.JUDGE_DECIDED, Point.JUDGE_JOURNALLED,
        Point.PROMOTE_BEGUN,
    ) for time, ends in (("", BEFORE_V1), (":3", BEFORE_V3))},
    **{f"{point}{time}": ends for point in (Point.PROMOTE_JOURNALLED, Point.PROMOTE_WRITTEN, Point.PROMOTE_TOLD)
       for time, ends in (("", AFTER_V1), (":3", AFTER_V3))},
    **dict.fromkeys((Point.RETIRE_BEGUN, Point.RETIRE_UNLOADED, Point.RETIRE_REMOVED), AFTER_V3),
    Point.ROLL_BACK_BEGUN: AFTER_V1, f"{Point.ROLL_BACK_BEGUN}:2": ON_BASE, f"{Point.ROLL_BACK_BEGUN}:3": AFTER_V3,
    **{f"{point}{time}": ends for point in (Point.ROLL_BACK_JOURNALLED, Point.ROLL_BACK_WRITTEN, Point.ROLL_BACK_TOLD)
       for time, ends in (("", ON_BASE), (":2", AFTER_V1), (":3", BACK))},
    **dict.fromkeys((Point.REJECT_BEGUN, Point.REJECT_JOURNALLED, Point.REJECT_WRITTEN, Point.REJECT_TOLD), BACK),
    **{f"{point}{time}": ends for point in (
        Point.SUBMIT_WRITTEN, Point.SUBMIT_JOURNALLED, Point.ATTEMPT_BEGUN, Point.UPDATE_WRITTEN, Point.ROUND_DONE,
    ) for time, ends in (("", AFTER_V1), (":2", AFTER_V1), (":4", BACK))},  # of two adapters at the same time
    **{f"{point}{time}": BACK for point in (
        Point.IMPORT_WRITTEN, Point.SERVE_BEGUN, Point.SERVE_JOURNALLED, Point.SERVE_WRITTEN, Point.SERVE_TOLD,
    ) for time in ("", ":3")},
    **dict.fromkeys(
        (Point.UNSERVE_BEGUN, Point.UNSERVE_JOURNALLED, Point.UNSERVE_WRITTEN, Point.UNSERVE_TOLD, "retire.begun:3",
         "retire.unloaded:3", "retire.removed:3", "retire.begun:4", "retire.removed:4"), BACK),
    Point.PART_KEPT: AFTER_V1,
    **dict.fromkeys((Point.SWEPT, Point.DAMAGE_FORGOTTEN), BEFORE_V1),
}  # fmt: skip
"""Points at which a site dies in the life of tests/toys/site_life.py → the aliases afterwards."""

CENTRE: dict[str, str | None] = {
    Point.BEGIN_PINNED: None,
    **{f"{point}{time}": live for point in (Point.BLOB_WRITTEN, Point.VERSION_RENAMED, Point.VERSION_LISTED)
       for time, live in (("", None), (":2", None), (":3", V1))},
    **{f"{point}{time}": live for point in (
        Point.ROUND_RECORDED, Point.VERSION_PUBLISHED, Point.VERDICT_RECORDED, Point.SITES_PROMOTED,
    ) for time, live in (("", None), (":2", V1))},
    Point.ALIASES_MOVED: None, f"{Point.ALIASES_MOVED}:2": V1, f"{Point.ALIASES_MOVED}:3": V2,
    Point.ROUND_ACCEPTED: V1, f"{Point.ROUND_ACCEPTED}:2": V2,
    **dict.fromkeys((
        Point.SITES_DISCARDED, f"{Point.SITES_DISCARDED}:2", Point.ROUND_REJECTED, f"{Point.ROUND_REJECTED}:2",
    )),
    **{f"{point}{time}": V3 for point in (Point.GC_MARKED, Point.GC_UNLINKED, Point.GC_REMOVED)
       for time in ("", ":2")},
}  # fmt: skip
"""Points at which the centre dies in the lives of tests/toys/centre_life.py → `live` in the registry afterwards."""
