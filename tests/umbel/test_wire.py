"""Messages between umbel's own processes: a round trip, limits, and nothing but WireError for bytes from outside."""

import contextlib
import doctest
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from umbel import wire
from umbel.adapter import Lifecycle
from umbel.errors import WireError
from umbel.messages import Evaluation, JobState, RoundReport, ShadowReport, Verdict

SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(
    SCALARS | st.binary(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8
)
BODIES = st.dictionaries(st.text().filter(lambda key: key not in ("kind", "schema")), VALUES, max_size=5)


@given(st.text(), BODIES)
def test_a_message_is_read_back_as_it_was_written(kind: str, body: dict[str, Any]) -> None:
    assert wire.unpack(wire.pack(kind, body)) == (kind, body)


def test_the_example_in_the_docstring_is_true() -> None:
    assert doctest.testmod(wire) == doctest.TestResults(failed=0, attempted=1)


MODELS: list[BaseModel] = [
    RoundReport(key="k", state=JobState.RUNNING, parent="p", steps=3, loss_sum=1.25, share=0.5),
    ShadowReport(
        ref="support@v1",
        state=Lifecycle.JUDGED,
        probe={"base": Evaluation(loss_sum=2.5, loss_tokens=4, exact=1, examples=2)},
        verdict=Verdict(accepted=False, decision="keep", reasons=("a", "ü")),
    ),
]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: type(model).__name__)
def test_a_model_is_read_back_as_it_was_written(model: BaseModel) -> None:
    assert wire.unpack_model(wire.pack_model(model), type(model)) == model


def test_another_kind_is_refused_by_both_names() -> None:
    with pytest.raises(WireError, match="expected a Verdict, got a RoundReport"):
        wire.unpack_model(wire.pack_model(MODELS[0]), Verdict)


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ({"accepted": True}, "reasons"),
        ({"accepted": "perhaps", "reasons": []}, "accepted"),
        ({"accepted": True, "reasons": [], "resons": []}, "resons"),
        ({"accepted": True, "reasons": ["x", 1]}, r"reasons\.1"),
        ({"accepted": True, "reasons": [], "decision": "perhaps"}, "decision"),
    ],
)
def test_a_field_that_is_wrong_is_named(body: dict[str, Any], where: str) -> None:
    with pytest.raises(WireError, match=f"^Verdict: {where}: "):
        wire.unpack_model(wire.pack("Verdict", body), Verdict)


@pytest.mark.parametrize("schema", [None, 0, 2, "1"])
def test_another_schema_says_to_run_the_same_release(schema: object) -> None:
    with pytest.raises(WireError, match="same umbel release"):
        wire.unpack(msgpack.packb({"schema": schema, "kind": "Verdict"}))


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        msgpack.packb([1, 2]),
        msgpack.packb("Verdict"),
        msgpack.packb({"schema": 1}),
        msgpack.packb({"schema": 1, "kind": 7}),
        msgpack.packb({"schema": 1, "kind": b"Verdict"}),
        msgpack.packb({"schema": 1, "kind": "Verdict"}) + b"\x00",
        msgpack.packb({"schema": 1, "kind": "Verdict", 3: 4}),
        msgpack.packb({"schema": 1, "kind": "Verdict"})[:-1],
        b"\x81\xa4kind\xa2\xff\xff",
        b"\x91" * 5000 + b"\xc0",
        b"\xdf\xff\xff\xff\xff",
        b"\x81\xc4\x01k\xc7\x0c\xff" + b"\xff" * 12,
    ],
)
def test_other_bytes_are_refused(payload: bytes) -> None:
    with pytest.raises(WireError):
        wire.unpack(payload)


@pytest.mark.parametrize("spare", [0, 1])
def test_the_limit_holds_to_the_byte(spare: int) -> None:
    overhead = len(wire.pack("blob", {"x": b"\0" * 70000})) - 70000
    body = {"x": b"\0" * (wire.MAX_BYTES - overhead + spare)}
    if not spare:
        assert len(wire.pack("blob", body)) == wire.MAX_BYTES
        assert wire.unpack(wire.pack("blob", body)) == ("blob", body)
        return
    with pytest.raises(WireError, match=r"blob: .* over the limit"):
        wire.pack("blob", body)
    with pytest.raises(WireError, match="over the limit"):
        wire.unpack(msgpack.packb({"schema": 1, "kind": "blob", **body}))


def only_wire_errors(payload: bytes) -> None:
    for model in (Verdict, ShadowReport, RoundReport):
        with contextlib.suppress(WireError):
            wire.unpack_model(payload, model)


@given(st.binary(max_size=200))
def test_random_bytes_raise_nothing_but_wire_errors(payload: bytes) -> None:
    only_wire_errors(payload)


KEYS = (
    st.sampled_from(["accepted", "reasons", "ref", "state", "probe", "verdict", "decision", "key", "steps"]) | st.text()
)


@given(st.sampled_from(["Verdict", "ShadowReport", "RoundReport"]), st.dictionaries(KEYS | st.binary(), VALUES))
def test_well_formed_nonsense_raises_nothing_but_wire_errors(kind: str, body: dict[str | bytes, Any]) -> None:
    only_wire_errors(msgpack.packb({**body, "schema": 1, "kind": kind}))


@given(st.binary(max_size=64), st.sampled_from([0xD4, 0xD5, 0xD6, 0xD7, 0xD8, 0xC7]), st.integers(0, 255))
def test_extension_types_raise_nothing_but_wire_errors(data: bytes, format_byte: int, code: int) -> None:
    head = bytes([format_byte, *([len(data)] if format_byte == 0xC7 else []), code])
    only_wire_errors(b"\x83\xa6schema\x01\xa4kind\xa7Verdict\xa1x" + head + data)
    only_wire_errors(b"\x83\xa6schema\x01\xa4kind\xa7Verdict" + head + data + b"\x01")
