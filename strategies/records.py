"""Flower records as umbel uses them: "body" holds one message, "adapter" one safetensors file, "metrics" sums.

The adapter is a single Array of raw bytes: so bfloat16 survives, Flower can cut it into chunks, and no Flower strategy
averages it by mistake. `client/flower/app.py` writes the same records with code of its own, as it ships without this
package.
"""

from typing import TypeVar

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from pydantic import BaseModel

from umbel import wire
from umbel.errors import WireError
from umbel.messages import Failure, RoundReport

M = TypeVar("M", bound=BaseModel)

BODY, MESSAGE, ADAPTER, METRICS = "body", "message", "adapter", "metrics"
STYPE = "umbel.safetensors"
"""Flower's name for the encoding of an array's bytes."""


def pack(body: BaseModel | None = None, adapter: bytes | None = None) -> RecordDict:
    """Return the content of a Flower message: a message of ours, and an adapter's bytes beside it."""
    content = RecordDict()
    if body is not None:
        content[BODY] = ConfigRecord({MESSAGE: wire.pack_model(body)})
    if adapter is not None:
        content[ADAPTER] = pack_adapter(adapter)
    return content


def pack_adapter(blob: bytes) -> ArrayRecord:
    """Wrap an adapter's bytes in an ArrayRecord."""
    return ArrayRecord({ADAPTER: Array(dtype="uint8", shape=(len(blob),), stype=STYPE, data=blob)})


def unpack(content: RecordDict, model: type[M]) -> M | Failure:
    """Return the `model` in a Flower message, or the site's Failure; raise WireError for anything else."""
    body = content.get(BODY)
    payload = body.get(MESSAGE) if isinstance(body, ConfigRecord) else None
    if not isinstance(payload, bytes):
        raise WireError(f"answer without a {model.__name__}; run the same umbel release at the centre and at the site")
    if wire.unpack(payload)[0] == Failure.__name__:
        return wire.unpack_model(payload, Failure)
    return wire.unpack_model(payload, model)


def unpack_adapter(content: RecordDict) -> bytes | None:
    """Return the adapter's bytes beside the message, None without any; raise WireError for another kind of array."""
    record = content.get(ADAPTER)
    if record is None:
        return None
    array = record.get(ADAPTER) if isinstance(record, ArrayRecord) else None
    if not isinstance(array, Array) or array.stype != STYPE:
        raise WireError(f"the record {ADAPTER!r} holds no array of kind {STYPE!r}")
    return array.data


def metrics(*reports: RoundReport) -> MetricRecord:
    """Add up the reports of several sites, under the names that Flower uses."""
    return MetricRecord(
        {
            "num-examples": sum(report.num_examples for report in reports),
            "num-loss-tokens": sum(report.num_loss_tokens for report in reports),
            "loss-sum": sum(report.loss_sum for report in reports),
        }
    )
