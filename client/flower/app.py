"""`app`: the ClientApp. It carries each Flower message to the site's daemon as one HTTP call over a Unix socket.

Flower runs it in a new process per message and never repeats a lost message. So every message takes seconds, may be
sent twice, and leaves no state here. The app ships without umbel's server side and imports nothing heavy.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from pydantic import BaseModel

from umbel import wire
from umbel.errors import UmbelError, WireError
from umbel.messages import (
    AdapterQuery,
    Failure,
    HelloQuery,
    Restore,
    RoundQuery,
    RoundReport,
    Shadow,
    Submit,
    VersionQuery,
)
from umbel.site.calls import Refused, SiteCalls

M = TypeVar("M", bound=BaseModel)
Handler = Callable[[SiteCalls, RecordDict], RecordDict]

STYPE = "umbel.safetensors"
"""Serialisation type of an adapter's bytes in a Flower Array."""

app = ClientApp()


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
def hello(site: SiteCalls, content: RecordDict) -> RecordDict:
    """Describe the site to the centre of one adapter: its name, its base, its data and the version it serves."""
    return _records(site.hello(_body(content, HelloQuery)))


@app.train("submit")
@_answers
def submit(site: SiteCalls, content: RecordDict) -> RecordDict:
    """Start a round, or find it again by its key."""
    return _round(*site.submit(_body(content, Submit), _adapter(content)))


@app.query("collect")
@_answers
def collect(site: SiteCalls, content: RecordDict) -> RecordDict:
    """Report the state of a round or a shadow, with the update of a finished round if it is asked for."""
    if wire.unpack(_payload(content))[0] == VersionQuery.__name__:
        return _records(site.version(_body(content, VersionQuery)))
    return _round(*site.round(_body(content, RoundQuery)))


@app.query("shadow")
@_answers
def shadow(site: SiteCalls, content: RecordDict) -> RecordDict:
    """Have a version loaded beside the live one and measured."""
    return _records(site.shadow(_body(content, Shadow), _adapter(content)))


@app.query("promote")
@_answers
def promote(site: SiteCalls, content: RecordDict) -> RecordDict:
    """Let the shadow answer users."""
    return _records(site.promote(_body(content, VersionQuery)))


@app.query("discard")
@_answers
def discard(site: SiteCalls, content: RecordDict) -> RecordDict:
    """Unload the shadow."""
    return _records(site.discard(_body(content, VersionQuery)))


@app.query("rollback")
@_answers
def rollback(site: SiteCalls, content: RecordDict) -> RecordDict:
    """Let the version that was live before answer users again."""
    return _records(site.roll_back(_body(content, AdapterQuery)))


@app.query("restore")
@_answers
def restore(site: SiteCalls, content: RecordDict) -> RecordDict:
    """Let the version that is live in the federation, or the base, answer users."""
    return _records(site.restore(_body(content, Restore)))


def _site(context: Context) -> SiteCalls:
    """Return the calls of the daemon at the socket in the SuperNode's node configuration; raise Refused without one."""
    socket = context.node_config.get("socket")
    if not isinstance(socket, str) or not socket:
        raise Refused(
            "ConfigError: this SuperNode does not know its site's socket; start it with "
            "--node-config 'socket=\"/path/to/site.sock\"'",
            final=True,
        )
    return SiteCalls(Path(socket).expanduser())


def _round(report: RoundReport, update: bytes | None) -> RecordDict:
    """Answer with a round's report, and with its update where there is one."""
    records = _records(report, update)
    if update is not None:
        records["metrics"] = MetricRecord(
            {
                "num-examples": report.num_examples,
                "num-loss-tokens": report.num_loss_tokens,
                "loss-sum": report.loss_sum,
            }
        )
    return records


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


def _body(content: RecordDict, model: type[M]) -> M:
    return wire.unpack_model(_payload(content), model)


def _adapter(content: RecordDict) -> bytes:
    array = content.array_records.get("adapter", ArrayRecord()).get("adapter")
    if array is None or array.stype != STYPE:
        raise WireError("message without its adapter; run the same umbel release at the centre and at the site")
    return array.data
