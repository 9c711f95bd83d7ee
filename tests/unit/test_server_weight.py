"""What a request takes once it is parsed: counted from its bytes as protobuf counts it from the message."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("esdbclient", reason="pip install 'tidings[eventstoredb]'")

from google.protobuf import json_format  # type: ignore[import-untyped]

from tidings.server.budgets import MIB, Allowance, Charge, Limits, Treasury
from tidings.server.protocol import streams
from tidings.server.refusals import Refusal
from tidings.server.weight import FIELD, MESSAGE, STEP, hold_parsed, weights
from tidings.stores.eventstoredb.records_messages import MESSAGES

texts = st.text(max_size=8)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.floats(allow_nan=False, allow_infinity=False), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=10,
)


@st.composite
def records(draw: Any) -> Any:
    request = MESSAGES["AppendRecordsRequest"]()
    for _ in range(draw(st.integers(0, 4))):
        record = request.records.add(data=draw(st.binary(max_size=200)), stream=draw(texts))
        record.schema.name, record.schema.format = draw(texts), draw(st.integers(0, 4))
        for key, value in draw(st.dictionaries(texts, values, max_size=3)).items():
            json_format.ParseDict(value, record.properties.add(key=key).value)
    for _ in range(draw(st.integers(0, 3))):
        request.checks.add(stream_state={"stream": draw(texts), "expected_state": draw(st.integers(-9, 9))})
    return request


@st.composite
def batches(draw: Any) -> Any:
    request = streams.BatchAppendReq(is_final=draw(st.booleans()))
    request.options.deadline.seconds = draw(st.integers(-9, 9))
    for _ in range(draw(st.integers(0, 4))):
        proposed = request.proposed_messages.add(data=draw(st.binary(max_size=200)))
        proposed.id.structured.least_significant_bits = draw(st.integers(-9, 9))
        for key, value in draw(st.dictionaries(texts, texts, max_size=3)).items():
            proposed.metadata[key] = value
    return request


def weight(message: Any) -> int:
    """As protobuf lists what is in it. In a map, each entry is a message of two fields."""
    total = 0
    for field, value in message.ListFields():
        repeated = field.label == field.LABEL_REPEATED
        if field.message_type is None:
            total += FIELD * (len(value) if repeated else 1)
        elif field.message_type.GetOptions().map_entry:
            of_messages = field.message_type.fields_by_name["value"].message_type is not None
            for key in value:
                total += MESSAGE + FIELD + (MESSAGE + weight(value[key]) if of_messages else FIELD)
        else:
            total += sum(MESSAGE + weight(each) for each in (value if repeated else [value]))
    return total


@given(st.one_of(records(), batches()))
def test_every_message_and_field_counts(message: Any) -> None:
    assert sum(weights(message.SerializeToString(), message.DESCRIPTOR)) == weight(message)


@given(records(), st.binary(max_size=30), st.integers(0, 400), st.integers(0, 9))
def test_no_less_is_counted_than_protobuf_finds_in_broken_bytes(message: Any, more: bytes, at: int, less: int) -> None:
    data = message.SerializeToString()
    data = data[:at] + more + data[at + less :]
    with suppress(Refusal):
        counted = sum(weights(data, message.DESCRIPTOR))
        try:
            parsed = type(message).FromString(data)
        except Exception:  # protobuf's own, for example of a text that is no UTF-8
            return
        assert counted >= weight(parsed)


@pytest.mark.parametrize(
    "data", [b"\x0a", b"\x0a\x05abc", b"\x0b", b"\x08", b"\xff" * 20, b"\x0a\xff\xff\xff\xff\xff\x7f", b"\x0d\0\0\0"]
)
def test_what_is_no_message_is_refused(data: bytes) -> None:
    for kind in (MESSAGES["AppendRecordsRequest"], streams.AppendReq):
        with pytest.raises(Refusal):
            list(weights(data, kind.DESCRIPTOR))


def test_messages_within_messages_have_an_end() -> None:
    data = b""
    for _ in range(60):  # a value, a list of values
        data = b"\x32" + _length(len(data)) + data
        data = b"\x0a" + _length(len(data)) + data
    value = MESSAGES["PropertiesEntry"].DESCRIPTOR.fields_by_name["value"].message_type
    with pytest.raises(Refusal):
        list(weights(data, value.fields_by_name["list_value"].message_type))


def _length(size: int) -> bytes:
    return bytes([size]) if size < 128 else bytes([size & 0x7F | 0x80, size >> 7])


async def test_it_is_counted_step_by_step_and_nothing_more_is_looked_at_when_there_is_no_room() -> None:
    charge = Charge(Allowance(Treasury(Limits())))
    charge.hold(charge.allowance.limits.connection_bytes - MIB)
    before = charge.bytes
    with pytest.raises(Refusal, match="connection_bytes"):
        await hold_parsed(b"\x0a\0" * 1_000_000, MESSAGES["AppendRecordsRequest"], charge)
    assert MIB - 2 * STEP < charge.bytes - before <= MIB
    charge.hold(before - charge.bytes)
    held = await asyncio.create_task(hold_parsed(b"\x0a\0" * 1000, MESSAGES["AppendRecordsRequest"], charge))
    assert held == charge.bytes - before == 1000 * MESSAGE
