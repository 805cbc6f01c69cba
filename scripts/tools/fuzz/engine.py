"""`engine_targets`: users of a running engine, who send what the router takes, damaged and hostile requests, and leave.

Every request is answered with a documented status, and a stream to its end without an error in it; the engine is never
started anew, and answers a good request right after.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
from hypothesis import strategies as st

from scripts.tools import tiny_base
from scripts.tools.fuzz.bodies import bodies, spoiled
from scripts.tools.fuzz.target import Target, damaged
from scripts.tools.processes import ENGINE_BIN, Processes, end_as_ctrl_c
from scripts.tools.trial_site import LENIENT, TrialSite, random_adapter, wait_until
from serving.router.fields.routes import ROUTES
from tests.toys.hostile.requests import CHAT, USERS
from umbel.errors import RequestRefused

STATUSES = (200, 400, 404, 413)
ENDS = ("[DONE]", "message_stop", "response.completed", "response.incomplete")
"""What the last event of a stream is, or is called."""
FAILED = ("error", "response.failed")
"""Types of events that say that an answer failed."""
REFUSED = ("invalid_request_error", "BadRequestError")
"""Types of errors that are a request's own: of a prompt that is too long SGLang tells in the stream."""
PATIENCE_S = 120.0
LEAVE = [None] * 40 + [0, 0, 1, 2, 3, 8]
"""When users leave: most do not."""
WAIT_S = 0.02
"""A user who is about to leave waits so long for each piece of an answer."""
MOST_SENT = 4 << 20
"""Bytes of a body: the server closes the connection of a longer one while it is still being sent."""


@dataclass(frozen=True)
class Asked:
    """One request, and when its user leaves. It is saved as JSON, bytes that are no UTF-8 as half surrogates."""

    path: str
    body: str
    method: str = "POST"
    headers: list[tuple[str, str]] = field(default_factory=lambda: [("content-type", "application/json")])
    leaves: int | None = None
    """Pieces of the answer after which the user closes the connection, or sooner; None is one who stays."""

    @classmethod
    def read(cls, data: bytes) -> "Asked":
        """Read a saved request."""
        return cls(**json.loads(data))

    def write(self) -> bytes:
        """Return the request as it is saved."""
        return json.dumps(asdict(self)).encode()


class Users:
    """Sends requests to a running site, and after each one checks that the engine is well.

    `starts` returns how often the engine was started; a user's key is in `headers`.
    """

    def __init__(self, url: str, starts: Callable[[], int], headers: dict[str, str]) -> None:
        self.client = httpx.Client(base_url=url, timeout=PATIENCE_S, headers=headers)
        self.starts, self.first = starts, starts()
        self.names = [card["id"] for card in self.client.get("/v1/models").raise_for_status().json()["data"]]

    def __call__(self, data: bytes) -> None:
        """Send a saved request; raise RequestRefused if it is refused as documented, and AssertionError otherwise."""
        status = self.ask(Asked.read(data))
        good = {"model": self.names[0], "messages": [{"role": "user", "content": "ward 3"}], "max_tokens": 1}
        after = self.client.post(CHAT, json=good)
        assert after.status_code == 200, f"a good request right after: {after.status_code} {after.text[:300]}"
        assert self.starts() == self.first, "the engine was started anew"
        if status not in (200, None):
            raise RequestRefused(f"{status}")

    def ask(self, asked: Asked) -> int | None:
        """Send a request and read the answer; return its status, or None if the user left before the end."""
        url = httpx.URL(f"{self.client.base_url}".rstrip("/") + asked.path)
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in asked.headers]
        body = asked.body.encode(errors="surrogateescape")
        wait = PATIENCE_S if asked.leaves is None else WAIT_S
        timeout, pieces = httpx.Timeout(PATIENCE_S, read=wait), list[bytes]()
        try:
            with self.client.stream(asked.method, url, headers=headers, content=body, timeout=timeout) as reply:
                for piece in reply.iter_raw():
                    pieces.append(piece)
                    if len(pieces) == asked.leaves:
                        return None
        except httpx.ReadTimeout:
            if asked.leaves is None:
                raise
            return None
        said = b"".join(pieces).decode()
        assert reply.status_code in STATUSES, f"{reply.status_code} {said[:300]}"
        if reply.headers["content-type"].startswith("text/event-stream"):
            _require_ended(said)
        else:
            json.loads(said)
        return reply.status_code

    def require_alone(self, in_flight: Callable[[], object]) -> None:
        """Wait until nobody is being answered: those who left, too; raise ProcessError if that takes long."""
        wait_until(lambda: not in_flight(), "the end of all answers")


def _require_ended(stream: str) -> None:
    """Require that a stream of events has an end, and no error but one that refuses the request."""
    data = [line.removeprefix("data:").strip() for line in stream.split("\n") if line.startswith("data:")]
    ended = (*ENDS, *REFUSED)
    assert any(end in one for one in data[-2:] for end in ended), f"a stream without an end: …{stream[-300:]}"
    for one in data:
        event = {} if one == "[DONE]" else json.loads(one)
        error = event.get("error") or ({} if event.get("type") in FAILED else None)
        assert error is None or error.get("type") in REFUSED, f"an error in a stream: {one[:300]}"


def engine_targets(users: Users, vocab: int) -> list[Target]:
    """Return a target for each route, and one for the catalogue of hostile requests."""
    by_route = [
        Target(path.removeprefix("/v1/").replace("/", " "), _requests(path, users.names, vocab), users)
        for path in ROUTES
    ]
    return [*by_route, Target("catalogue", st.sampled_from(_catalogue()).flatmap(_any_bytes), users)]


def _requests(path: str, names: list[str], vocab: int) -> st.SearchStrategy[bytes]:
    """Return requests to a route: as the router takes them, with other values, and with damaged bytes."""
    good = bodies(path, names, vocab)
    written = good.map(_written)
    sent = written | spoiled(good).map(_written) | written.flatmap(_damaged)
    return st.builds(lambda body, leaves: Asked(path, body, leaves=leaves).write(), sent, st.sampled_from(LEAVE))


def _written(body: Any) -> str:
    return json.dumps(body)


def _damaged(body: str) -> st.SearchStrategy[str]:
    return damaged([body.encode(errors="surrogateescape")]).map(lambda data: data.decode(errors="surrogateescape"))


def _catalogue() -> list[Asked]:
    """Return the catalogue's requests, without their keys; httpx sends none that say another length than they have."""
    found = []
    for method, path, headers, chunks in [one.make() for one in USERS]:
        named = [(key.decode("latin-1"), value.decode("latin-1")) for key, value in headers if key != b"authorization"]
        if sum(map(len, chunks)) <= MOST_SENT and not any(key == b"content-length" for key, _ in headers):
            found.append(Asked(path, b"".join(chunks).decode(errors="surrogateescape"), method, named))
    return found


def _any_bytes(asked: Asked) -> st.SearchStrategy[bytes]:
    """Return a request as it is, and with damaged bytes."""
    changed = _damaged(asked.body).map(lambda body: Asked(asked.path, body, asked.method, asked.headers).write())
    return st.just(asked.write()) | changed


@contextmanager
def started_engine(folder: Path) -> Iterator[list[Target]]:
    """Start a tiny site with a live version in `folder`, and give its targets; nothing of it is left afterwards."""
    end_as_ctrl_c()
    processes = Processes(folder / "logs")
    try:
        base = tiny_base.build(folder / "base", tiny_base.TINY)
        site = TrialSite(folder / "site", base, "fuzz", extra=LENIENT)
        processes.start("site", [str(ENGINE_BIN / "umbel"), "serve", str(site.file)])
        processes.wait_for(site.starts, "the site's start", 300)
        site.promote(site.offer(1, random_adapter(base, 1))).raise_for_status()
        users = Users(site.url, site.starts, {})
        yield engine_targets(users, tiny_base.TINY.vocab)
        users.require_alone(lambda: site.status()["in_flight"])
    finally:
        processes.stop()
