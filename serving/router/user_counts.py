"""`UserCounts`: counts of one version's answers by user, of a bounded number of users and without their ids.

A user is known by a code: an HMAC under a key that is drawn when the engine starts and is in its memory only. The codes
of two runs of an engine have nothing in common, and no code can be traced back to a user without that key.

Of too many users those with the smallest codes are kept (bottom-k sketch: Cohen and Kaplan, PODC 2007). A code is as
good as a random number, so they are a random sample, and the same users are sampled for each version. Their number is
then estimated from the largest code that is kept (Bar-Yossef et al., RANDOM 2002).
"""

import hashlib
import heapq
import secrets
from dataclasses import dataclass

from serving.traffic_report import UserTraffic

KEPT_USERS = 512
"""Highest number of users whose counts are kept for each version."""
CODE_BITS = 53
"""Bits of a code: a number of so many is the same in every reader of JSON."""


class UserCodes:
    """Gives users codes that are worth nothing outside this object."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)

    def of(self, adapter: str, user: str) -> int:
        """Return the code of a user of an adapter."""
        text = f"{adapter}\0{user}".encode(errors="surrogatepass")
        digest = hashlib.blake2b(text, key=self._key, digest_size=8).digest()
        return int.from_bytes(digest) >> (64 - CODE_BITS)


@dataclass(slots=True)
class UserCount:
    """What `UserTraffic` reports of one user, as it is counted."""

    requests: int = 0
    errors: int = 0
    up: int = 0
    down: int = 0
    streams: int = 0
    log_ttft: float = 0.0
    paced: int = 0
    log_tpot: float = 0.0

    def report(self) -> UserTraffic:
        """Return the counts."""
        return UserTraffic(
            requests=self.requests, errors=self.errors, up=self.up, down=self.down, streams=self.streams,
            log_ttft=self.log_ttft, paced=self.paced, log_tpot=self.log_tpot,
        )  # fmt: skip


class UserCounts:
    """The counts of one version's users, of at most `most` of them."""

    def __init__(self, most: int = KEPT_USERS) -> None:
        self._most = most
        self._users: dict[int, UserCount] = {}
        self._largest: list[int] = []
        """A heap of the negated codes: the largest code comes first."""
        self._all_kept = True

    def of(self, code: int) -> UserCount | None:
        """Return a user's counts, to be added to; None for one who is not in the sample."""
        if code in self._users:
            return self._users[code]
        if len(self._users) == self._most:
            self._all_kept = False
            if code > -self._largest[0]:
                return None
            del self._users[-heapq.heappop(self._largest)]
        heapq.heappush(self._largest, -code)
        self._users[code] = UserCount()
        return self._users[code]

    @property
    def distinct(self) -> int:
        """The number of distinct users, an estimate where not all are kept."""
        if self._all_kept:
            return len(self._users)
        return (self._most - 1) * (1 << CODE_BITS) // (1 - self._largest[0])

    def report(self) -> dict[int, UserTraffic]:
        """Return the counts by code."""
        return {code: count.report() for code, count in self._users.items()}
