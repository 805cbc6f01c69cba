"""Flower records: only those that umbel made are read."""

import pytest
from flwr.app import ConfigRecord, RecordDict

from strategies.records import pack_adapter, unpack, unpack_adapter
from umbel.errors import WireError
from umbel.messages import Hello


def test_records_refuse_what_they_did_not_make() -> None:
    with pytest.raises(WireError, match="without a Hello"):
        unpack(RecordDict(), Hello)
    with pytest.raises(WireError, match="msgpack"):
        unpack(RecordDict({"body": ConfigRecord({"message": b"\xc1"})}), Hello)
    record = pack_adapter(b"abc")
    record["adapter"].stype = "numpy.ndarray"
    with pytest.raises(WireError, match=r"umbel\.safetensors"):
        unpack_adapter(RecordDict({"adapter": record}))
