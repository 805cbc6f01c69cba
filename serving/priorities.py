"""`Priority`: the classes of requests, as the numbers that SGLang orders them by with `enable_priority_scheduling`.

Without that flag SGLang takes requests in the order in which they came, whatever their class; the co-trainer knows the
classes either way.
"""

from enum import IntEnum


class Priority(IntEnum):
    """Classes of requests; a higher number goes first.

    They lie further apart than SGLang's threshold (10), so a request that finds the engine full takes the place of a
    running one of a lower class, which goes on later; never that of one of its own class.
    """

    INTERACTIVE = 0
    """A user, or the daemon, waits for it."""
    BATCH = -100
    """A user's, for which nobody waits."""
    MIRROR = -200
    """The router's own: a replay on a shadow, or the beginning of a prompt, computed before users send it."""
    CHECK = -300
    """The supervisor's own, for one token; nothing is learnt from its latencies."""


CLASSES = {"interactive": Priority.INTERACTIVE, "batch": Priority.BATCH}
"""Names that users' requests may give as `priority` → their class. Numbers are refused."""
