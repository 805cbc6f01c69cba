"""`main`: run Flower's SuperNode, which looks for the next message soon after it has answered one.

Flower's SuperNode looks for a message, and where there is none it sleeps for three seconds (flwr 1.41 and 1.42,
`start_client_internal`). A round is a conversation: the centre sends each message when the last was answered, a moment
after that look. So each would lie there for most of three seconds. Here the pause is a quarter of the time since the
last answer, and three seconds again when twelve have passed.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

from flwr.supernode import start_client_internal
from flwr.supernode.cli import flower_supernode

IDLE_S = 3.0
"""Seconds that Flower's loop sleeps where there is no message; while it waits for a ClientApp it sleeps for less."""
REPLY_S = 0.1
"""Seconds between two looks for the ClientApp's reply."""
SHORTEST_S = 0.2
"""Seconds of the shortest pause between two looks for a message."""


class Pauses:
    """The module `time` for Flower's loop, with a `sleep` that is short while a conversation goes on.

    >>> pauses = Pauses()
    >>> pauses.sleep(0.5)  # a message is in hand: 0.1 s
    >>> pauses.sleep(3)    # there is none: 0.2 s at first, 1 s when 4 s have passed
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._clock = clock
        self._sleep = sleep
        self._answered = clock()

    def sleep(self, seconds: float) -> None:
        """Sleep for so many seconds, or for less."""
        if seconds < IDLE_S:
            self._sleep(min(seconds, REPLY_S))
            self._answered = self._clock()
        else:
            self._sleep(min(seconds, max(SHORTEST_S, (self._clock() - self._answered) / 4)))

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def main() -> None:
    """Run `flower-supernode` with this process's arguments."""
    sys.argv[0] = "flower-supernode"
    vars(start_client_internal)["time"] = Pauses()
    flower_supernode()


if __name__ == "__main__":
    main()
