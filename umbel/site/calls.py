"""`SiteCalls`: the messages of a centre as calls of a site's control API, over its Unix socket.

The ClientApp carries Flower's messages this way, and a site that trains alone its own.
"""

import base64
import re
from pathlib import Path
from typing import Self, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from umbel.adapter import AdapterRef
from umbel.errors import WireError
from umbel.messages import (
    AdapterQuery,
    Failure,
    Hello,
    HelloQuery,
    JobState,
    LiveVersion,
    Restore,
    Restored,
    RoundQuery,
    RoundReport,
    Shadow,
    ShadowReport,
    Submit,
    VersionQuery,
)

M = TypeVar("M", bound=BaseModel)

NO_ROOM = 507
"""Status with which the daemon says that its disk is full: the centre does not wait until somebody makes room."""
_PATH = re.compile(r"[A-Za-z0-9@/_-]+")
TIMEOUT = httpx.Timeout(60.0, connect=5.0)
"""Seconds. The daemon answers within WAIT; a minute covers the upload of a large adapter to a busy disk."""

WAIT = {"wait": "20"}
"""Seconds that the daemon may hold a question about unfinished work. Each message costs the site a process start, so a
round whose training and probe end by then costs three. The daemon holds it for less where several federations share the
SuperNode, which takes the next message only after this one."""


class Refused(Exception):
    """The daemon refused a call, or could not be reached; `final` if sending the message again cannot help."""

    def __init__(self, error: str, *, final: bool) -> None:
        super().__init__(error)
        self.failure = Failure(error=error, final=final)


class SiteCalls:
    """Calls the daemon at a socket, as a context manager.

    Each call raises Refused with the reason of the daemon or the operating system, and WireError for an answer that is
    none, or for a name that would make another call.

    >>> with SiteCalls(config.socket) as site:
    ...     site.hello(HelloQuery(adapter="support"))
    """

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        # There is no TLS on a socket, and to read the system's certificates for it takes 50 ms of each message.
        transport = httpx.HTTPTransport(verify=False, uds=str(socket))
        self._client = httpx.Client(transport=transport, base_url="http://site", timeout=TIMEOUT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def hello(self, asked: HelloQuery) -> Hello:
        """Return the site's description of itself to the centre of one adapter."""
        return self._call(Hello, "GET", "/hello", params={"adapter": asked.adapter, "nonce": asked.nonce})

    def submit(self, asked: Submit, parent: bytes) -> tuple[RoundReport, bytes | None]:
        """Start a round, or find it again by its key; return when it has ended, or after WAIT."""
        order = base64.b64encode(asked.order.model_dump_json().encode()).decode()
        path, headers = f"/adapters/{asked.adapter}/rounds/{asked.order.key}", {"x-umbel-order": order}
        headers["x-umbel-signature"] = asked.signature
        return self._round(path, self._call(RoundReport, "POST", path, parent, headers, WAIT), fetch=asked.fetch)

    def round(self, asked: RoundQuery) -> tuple[RoundReport, bytes | None]:
        """Return the state of a round, with the update of a finished one if it is asked for."""
        path = f"/adapters/{asked.adapter}/rounds/{asked.key}"
        return self._round(path, self._call(RoundReport, "GET", path, params=WAIT), fetch=asked.fetch)

    def version(self, asked: VersionQuery) -> ShadowReport:
        """Return the state of a version."""
        return self._call(ShadowReport, "GET", f"{_path(asked)}/shadow", params={**WAIT, "nonce": asked.nonce})

    def shadow(self, asked: Shadow, weights: bytes) -> ShadowReport:
        """Have a version loaded beside the live one and measured; return when it is judged, or after WAIT."""
        manifest = base64.b64encode(asked.manifest.model_dump_json().encode()).decode()
        path = f"/adapters/{asked.manifest.name}/shadow"
        headers = {"x-umbel-manifest": manifest, "x-umbel-signature": asked.signature}
        return self._call(ShadowReport, "POST", path, weights, headers, {**WAIT, "nonce": asked.nonce})

    def promote(self, asked: VersionQuery) -> ShadowReport:
        """Let the shadow answer users."""
        return self._call(ShadowReport, "POST", f"{_path(asked)}/promote")

    def discard(self, asked: VersionQuery) -> ShadowReport:
        """Unload the shadow."""
        return self._call(ShadowReport, "POST", f"{_path(asked)}/discard")

    def roll_back(self, asked: AdapterQuery) -> LiveVersion:
        """Let the version that was live before answer users again."""
        only_if = {"instead_of": asked.instead_of} if asked.instead_of else None
        return self._call(LiveVersion, "POST", f"/adapters/{asked.adapter}/rollback", params=only_if)

    def restore(self, asked: Restore) -> Restored:
        """Let the version that is live in the federation, or the base, answer users."""
        wanted = {"ref": asked.ref} if asked.ref else None
        return self._call(Restored, "POST", f"/adapters/{asked.adapter}/restore", params=wanted)

    def _round(self, path: str, report: RoundReport, *, fetch: bool) -> tuple[RoundReport, bytes | None]:
        if not fetch or report.state is not JobState.DONE:
            return report, None
        return report, self._send("GET", f"{path}/update").content

    def _send(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        params: dict[str, str] | None = None,
    ) -> httpx.Response:
        if not _PATH.fullmatch(path):  # a name from the centre must not become another call, such as a forced promotion
            raise WireError(f"{path[:120]!r} is not a path of the control API; names have letters, digits, '-' and '_'")
        try:
            response = self._client.request(method, path, content=body, headers=headers, params=params)
        except httpx.TimeoutException as error:  # the centre asks again, which is safe
            reason = f"EngineError: the site's daemon did not answer {method} {path} in time; it may still do it"
            raise Refused(reason, final=False) from error
        except httpx.HTTPError as error:
            reason = f"{self._socket}: the site's daemon does not answer ({error}); is `umbel serve` running?"
            raise Refused(f"EngineError: {reason}", final=False) from error
        if response.is_success:
            return response
        raise Refused(_reason(response), final=response.is_client_error or response.status_code == NO_ROOM)

    def _call(
        self,
        model: type[M],
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        params: dict[str, str] | None = None,
    ) -> M:
        response = self._send(method, path, body, headers, params)
        try:
            return model.model_validate_json(response.content)
        except ValidationError as error:
            raise WireError(
                f"{method} {path}: the site's daemon did not answer with a {model.__name__} ({error.error_count()} "
                "mistakes); run the same umbel release at the SuperNode and the daemon"
            ) from error


def _path(asked: VersionQuery) -> str:
    return f"/adapters/{AdapterRef.parse(asked.ref)}"


def _reason(response: httpx.Response) -> str:
    """Return the daemon's structured error as one line, or the HTTP status if there is none."""
    try:
        error = response.json()["error"]
        return f"{error['type']}: {error['message']}"
    except (ValueError, LookupError, TypeError):
        return f"EngineError: the site's daemon answered {response.status_code} {response.reason_phrase}"
