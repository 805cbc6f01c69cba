"""`Suspects`: the daemon's judgement on which requests ended engines; `Refusals` tells the next engine's HTTP process.

Requests are known by an HMAC of route and body under a key of the daemon's run, and by nothing else. The rule: a
request that was in flight when an engine died is suspected, unless the same request was ever answered to its end. It
is refused for an hour if it was the only suspect, or a suspect of a second death within an hour.
"""

import hmac
import secrets
from collections.abc import Collection, Container
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict

from serving.engine_state import DIGEST_BYTES
from umbel.peft_dir import replace_durably

FILE = "refused.json"
"""Name of the file of `Refusals` in the run directory."""
REFUSED_S = 3600.0
"""Seconds for which a request is refused, and for which a suspicion is remembered."""
MOST = 1024
"""Number of suspects, and of refused requests, that are remembered; the oldest make way."""


class Refusals(BaseModel):
    """Contents of `refused.json`: requests that an engine does not answer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    """Key of the digests, in hex."""
    until: dict[str, float] = {}
    """Digest in hex → Unix time until which the request is refused."""

    @classmethod
    def read(cls, run_dir: Path) -> Self | None:
        """Read the file; None where there is none. Raises ValidationError for a damaged one."""
        file = run_dir / FILE
        return cls.model_validate_json(file.read_text()) if file.is_file() else None

    def digest(self, path: str, body: bytes) -> bytes:
        """Return the digest of a request to the route `path`, `DIGEST_BYTES` long."""
        code = hmac.new(bytes.fromhex(self.key), path.encode() + b"\n", "sha256")
        code.update(body)
        return code.digest()[:DIGEST_BYTES]


class Suspects:
    """What a daemon knows of requests that ended its engines. Times are Unix times, in seconds."""

    def __init__(self) -> None:
        self._key = secrets.token_hex(32)
        self._suspected: dict[bytes, float] = {}
        self._until: dict[bytes, float] = {}

    def engine_died(self, in_flight: Collection[bytes], answered: Container[bytes], now: float) -> list[bytes]:
        """Judge the requests that were in flight at an engine's death; return those that are refused from now on."""
        suspects = list(dict.fromkeys(digest for digest in in_flight if digest not in answered))
        alone = len(suspects) == 1
        again = [one for one in suspects if now - self._suspected.get(one, -REFUSED_S) < REFUSED_S]
        refused = suspects if alone else again
        self._suspected = _latest({**self._suspected, **dict.fromkeys(suspects, now)})
        self._until = _latest({**self._until, **dict.fromkeys(refused, now + REFUSED_S)})
        return refused

    def refusals(self, now: float) -> Refusals:
        """Return what an engine that starts at `now` has to refuse."""
        return Refusals(key=self._key, until={one.hex(): until for one, until in self._until.items() if until > now})

    def write(self, run_dir: Path, now: float) -> None:
        """Write `refused.json` for an engine that starts at `now`."""
        replace_durably(run_dir / FILE, self.refusals(now).model_dump_json().encode())


def _latest(times: dict[bytes, float]) -> dict[bytes, float]:
    """Return the entries with the latest times, at most `MOST`."""
    return dict(sorted(times.items(), key=lambda entry: entry[1])[-MOST:])
