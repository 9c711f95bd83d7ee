"""Metadata as Tidings writes it is read without a parser, and never otherwise than a parser would read it."""

from __future__ import annotations

import json
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tidings import Event
from tidings.modelling.codec import encode
from tidings.modelling.context import Context
from tidings.protocol.metadata import own_metadata, own_partition_key
from tidings.protocol.position import carried, partition_key
from tidings.stores import RecordedEvent

NAMES = ("$correlationId", "schemaVersion", "$causationId", "tidingsHandler", "traceparent", "partitionKey")


class Keyed(Event, key="key"):
    key: str


def packed(document: Any) -> bytes:
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")


def read(metadata: bytes) -> Any:
    try:
        return json.loads(metadata.decode())
    except ValueError:
        return None


def test_what_an_append_writes_is_read_without_a_parser() -> None:
    metadata = encode(Keyed(key="order-1"), id=uuid4(), correlation_id="c").metadata
    assert own_metadata(metadata) == {"$correlationId": "c", "schemaVersion": 1, "partitionKey": "order-1"}
    assert own_partition_key(metadata) == "order-1"


def test_what_a_handler_emits_is_read_without_a_parser() -> None:
    cause = RecordedEvent(7, "s", 0, "Keyed", b"{}", b'{"traceparent":"00-1-2-01"}', True, uuid4().bytes, 0)
    context = Context("shop", "handle", uuid4(), cause, {"traceparent": "00-1-2-01"}, 1)
    context.emit("stream", Keyed(key="k"))
    metadata = context.emissions[0].event.metadata
    found = own_metadata(metadata)
    assert found == read(metadata)
    assert set(found or ()) == set(NAMES)


@given(
    st.dictionaries(
        st.sampled_from(NAMES) | st.text(max_size=3),
        st.text(st.characters(exclude_categories=()), max_size=5) | st.integers(-2, 10**12) | st.none() | st.booleans(),
    ).map(packed)
    | st.binary(max_size=40)
)
@example(b'{"$correlationId":"a","schemaVersion":1,"partitionKey":"a","partitionKey":"b"}')
@example(b'{"$correlationId":"a","schemaVersion":01}')
@example(b'{"$correlationId":"a","schemaVersion":1}\n')
@example(b'{"$correlationId":"a\\u0041","schemaVersion":1}')
@example(b'{"$correlationId":"\xff","schemaVersion":1}')
def test_it_never_reads_what_a_parser_would_not(metadata: bytes) -> None:
    found = own_metadata(metadata)
    if found is not None:
        assert found == read(metadata)
        assert list(found) == list(read(metadata))


@given(st.text(st.characters(exclude_categories=()), max_size=4), st.text(max_size=4), st.integers(0, 600))
def test_the_partition_key_is_the_one_that_a_parser_finds(key: str, correlation: str, brackets: int) -> None:
    document = {"$correlationId": correlation + "{" * brackets, "schemaVersion": 1, "partitionKey": key}
    metadata = packed(document)
    event = RecordedEvent(0, "stream", 0, "T", b"{}", metadata, True, bytes(16), 0)
    same = RecordedEvent(0, "stream", 0, "T", b"{}", packed(document | {"more": 1}), True, bytes(16), 0)
    assert partition_key(event) == partition_key(same) == partition_key(event, own_metadata(metadata))
    assert carried(event) == carried(event, own_metadata(metadata))


@pytest.mark.parametrize("value", ["", "x" * 100_000])
def test_long_and_empty_texts_are_texts(value: str) -> None:
    metadata = packed({"$correlationId": value, "schemaVersion": 1})
    assert own_metadata(metadata) == read(metadata)
