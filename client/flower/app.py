"""`app`: the ClientApp. It carries each Flower message to the site's daemon as one HTTP call over a Unix socket.

Flower runs it in a new process per message and never repeats a lost message. So every message takes seconds, may be
sent twice, and leaves no state here. The app ships without umbel's server side and imports nothing heavy.
"""

import base64
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import httpx
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from pydantic import BaseModel, ValidationError

from umbel import wire
from umbel.adapter import AdapterRef
from umbel.errors import UmbelError, WireError
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
Handler = Callable[[httpx.Client, RecordDict], RecordDict]

STYPE = "umbel.safetensors"
"""Serialisation type of an adapter's bytes in a Flower Array."""
NO_ROOM = 507
"""Status with which the daemon says that its disk is full: the centre does not wait until somebody makes room."""
_PATH = re.compile(r"[A-Za-z0-9@/_-]+")
TIMEOUT = httpx.Timeout(60.0, connect=5.0)
"""Seconds. The daemon answers within WAIT; a minute covers the upload of a large adapter to a busy disk."""

WAIT = {"wait": "20"}
"""Seconds that the daemon may hold a question about unfinished work. Each message costs the site a process start, so a
round whose training and probe end by then costs three. The daemon holds it for less where several federations share the
SuperNode, which takes the next message only after this one."""

app = ClientApp()


class Refused(Exception):
    """The daemon refused a call, or could not be reached; `final` if sending the message again cannot help."""

    def __init__(self, error: str, *, final: bool) -> None:
        super().__init__(error)
        self.failure = Failure(error=error, final=final)


def _answers(handler: Handler) -> Callable[[Message, Context], Message]:
    """Turn a function of (site, content) into a Flower handler that replies with a Failure when an error is raised."""

    @functools.wraps(handler)
    def reply(message: Message, context: Context) -> Message:
        try:
            with _site(context) as site:
                content = handler(site, message.content)
        except Refused as refused:
            content = _records(refused.failure)
        except UmbelError as error:
            content = _records(Failure(error=f"{type(error).__name__}: {error}", final=True))
        return Message(content, reply_to=message)

    return reply


@app.query("hello")
@_answers
def hello(site: httpx.Client, content: RecordDict) -> RecordDict:
    """Describe the site to the centre of one adapter: its name, its base, its data and the version it serves."""
    asked = _body(content, HelloQuery)
    return _records(_call(site, Hello, "GET", "/hello", params={"adapter": asked.adapter, "nonce": asked.nonce}))


@app.train("submit")
@_answers
def submit(site: httpx.Client, content: RecordDict) -> RecordDict:
    """Start a round, or find it again by its key; answer when it has ended, or after WAIT."""
    asked = _body(content, Submit)
    order = base64.b64encode(asked.order.model_dump_json().encode()).decode()
    path, headers = f"/adapters/{asked.adapter}/rounds/{asked.order.key}", {"x-umbel-order": order}
    headers["x-umbel-signature"] = asked.signature
    report = _call(site, RoundReport, "POST", path, _adapter(content), headers, WAIT)
    return _round(site, path, report, fetch=asked.fetch)


@app.query("collect")
@_answers
def collect(site: httpx.Client, content: RecordDict) -> RecordDict:
    """Report the state of a round or a shadow, with the update of a finished round if it is asked for."""
    if _kind(content) == VersionQuery.__name__:
        params = {**WAIT, "nonce": _body(content, VersionQuery).nonce}
        return _records(_call(site, ShadowReport, "GET", f"/adapters/{_ref(content)}/shadow", params=params))
    asked = _body(content, RoundQuery)
    path = f"/adapters/{asked.adapter}/rounds/{asked.key}"
    return _round(site, path, _call(site, RoundReport, "GET", path, params=WAIT), fetch=asked.fetch)


@app.query("shadow")
@_answers
def shadow(site: httpx.Client, content: RecordDict) -> RecordDict:
    """Have a version loaded beside the live one and measured; answer when it is judged, or after WAIT."""
    asked = _body(content, Shadow)
    manifest = base64.b64encode(asked.manifest.model_dump_json().encode()).decode()
    path = f"/adapters/{asked.manifest.name}/shadow"
    headers = {"x-umbel-manifest": manifest, "x-umbel-signature": asked.signature}
    params = {**WAIT, "nonce": asked.nonce}
    return _records(_call(site, ShadowReport, "POST", path, _adapter(content), headers, params))


@app.query("promote")
@_answers
def promote(site: httpx.Client, content: RecordDict) -> RecordDict:
    """Let the shadow answer users."""
    return _records(_call(site, ShadowReport, "POST", f"/adapters/{_ref(content)}/promote"))


@app.query("discard")
@_answers
def discard(site: httpx.Client, content: RecordDict) -> RecordDict:
    """Unload the shadow."""
    return _records(_call(site, ShadowReport, "POST", f"/adapters/{_ref(content)}/discard"))


@app.query("rollback")
@_answers
def rollback(site: httpx.Client, content: RecordDict) -> RecordDict:
    """Let the version that was live before answer users again."""
    asked = _body(content, AdapterQuery)
    only_if = {"instead_of": asked.instead_of} if asked.instead_of else None
    return _records(_call(site, LiveVersion, "POST", f"/adapters/{asked.adapter}/rollback", params=only_if))


@app.query("restore")
@_answers
def restore(site: httpx.Client, content: RecordDict) -> RecordDict:
    """Let the version that is live in the federation, or the base, answer users."""
    asked = _body(content, Restore)
    wanted = {"ref": asked.ref} if asked.ref else None
    return _records(_call(site, Restored, "POST", f"/adapters/{asked.adapter}/restore", params=wanted))


def _round(site: httpx.Client, path: str, report: RoundReport, *, fetch: bool) -> RecordDict:
    """Answer with a round's report, and to `fetch` with the update of one that is done."""
    if not fetch or report.state is not JobState.DONE:
        return _records(report)
    records = _records(report, _send(site, "GET", f"{path}/update").content)
    records["metrics"] = MetricRecord(
        {"num-examples": report.num_examples, "num-loss-tokens": report.num_loss_tokens, "loss-sum": report.loss_sum}
    )
    return records


def _site(context: Context) -> httpx.Client:
    """Return a client of the daemon at the socket in the SuperNode's node configuration; raise Refused without one."""
    socket = context.node_config.get("socket")
    if not isinstance(socket, str) or not socket:
        raise Refused(
            "ConfigError: this SuperNode does not know its site's socket; start it with "
            "--node-config 'socket=\"/path/to/site.sock\"'",
            final=True,
        )
    path = str(Path(socket).expanduser())
    headers = {"x-umbel-socket": path}  # for the error message when no daemon answers
    # There is no TLS on a socket, and to read the system's certificates for it takes 50 ms of each message.
    return httpx.Client(
        transport=httpx.HTTPTransport(verify=False, uds=path), base_url="http://site", timeout=TIMEOUT, headers=headers
    )


def _send(
    site: httpx.Client,
    method: str,
    path: str,
    body: bytes | None = None,
    headers: dict[str, str] | None = None,
    params: dict[str, str] | None = None,
) -> httpx.Response:
    """Call the daemon.

    Raises Refused with the reason of the daemon or the operating system, WireError for a path that no call has.
    """
    if not _PATH.fullmatch(path):  # a name from the centre must not become another call, such as a forced promotion
        raise WireError(f"{path[:120]!r} is not a path of the control API; names have letters, digits, '-' and '_'")
    try:
        response = site.request(method, path, content=body, headers=headers, params=params)
    except httpx.TimeoutException as error:  # the centre asks again, which is safe
        reason = f"EngineError: the site's daemon did not answer {method} {path} in time; it may still do it"
        raise Refused(reason, final=False) from error
    except httpx.HTTPError as error:
        socket = site.headers["x-umbel-socket"]
        reason = f"EngineError: {socket}: the site's daemon does not answer ({error}); is `umbel serve` running?"
        raise Refused(reason, final=False) from error
    if response.is_success:
        return response
    raise Refused(_reason(response), final=response.is_client_error or response.status_code == NO_ROOM)


def _reason(response: httpx.Response) -> str:
    """Return the daemon's structured error as one line, or the HTTP status if there is none."""
    try:
        error = response.json()["error"]
        return f"{error['type']}: {error['message']}"
    except (ValueError, LookupError, TypeError):
        return f"EngineError: the site's daemon answered {response.status_code} {response.reason_phrase}"


def _call(
    site: httpx.Client,
    model: type[M],
    method: str,
    path: str,
    body: bytes | None = None,
    headers: dict[str, str] | None = None,
    params: dict[str, str] | None = None,
) -> M:
    response = _send(site, method, path, body, headers, params)
    try:
        return model.model_validate_json(response.content)
    except ValidationError as error:
        raise WireError(
            f"{method} {path}: the site's daemon did not answer with a {model.__name__} ({error.error_count()} "
            "mistakes); run the same umbel release at the SuperNode and the daemon"
        ) from error


def _records(body: BaseModel, adapter: bytes | None = None) -> RecordDict:
    records = RecordDict({"body": ConfigRecord({"message": wire.pack_model(body)})})
    if adapter is not None:
        array = Array(dtype="uint8", shape=(len(adapter),), stype=STYPE, data=adapter)
        records["adapter"] = ArrayRecord({"adapter": array})
    return records


def _payload(content: RecordDict) -> bytes:
    payload = content.config_records.get("body", ConfigRecord()).get("message")
    if not isinstance(payload, bytes):
        raise WireError("message without a body; run the same umbel release at the centre and at the site")
    return payload


def _kind(content: RecordDict) -> str:
    return wire.unpack(_payload(content))[0]


def _body(content: RecordDict, model: type[M]) -> M:
    return wire.unpack_model(_payload(content), model)


def _ref(content: RecordDict) -> AdapterRef:
    return AdapterRef.parse(_body(content, VersionQuery).ref)


def _adapter(content: RecordDict) -> bytes:
    array = content.array_records.get("adapter", ArrayRecord()).get("adapter")
    if array is None or array.stype != STYPE:
        raise WireError("message without its adapter; run the same umbel release at the centre and at the site")
    return array.data
