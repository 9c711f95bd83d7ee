"""The wire format: what the relay writes a service reads back, and nothing else gets past."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tidings.protocol.message as message
from tidings.errors import MalformedMessage
from tidings.protocol.message import BODY_LIMIT, MARKER, Marker, Message, decode, encode
from tidings.protocol.position import BUCKETS, RESERVED, bucket_of, carried, partition_key
from tidings.protocol.seal import Seal
from tidings.stores import JSON, OCTETS, RecordedEvent

LOG = UUID("0a1b2c3d-0000-4000-8000-00000000000f")
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

names = (
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
    | st.builds(lambda text, times: text * times, st.text("aé☃", min_size=1, max_size=3), st.integers(256, 400))
).filter(lambda name: not name.startswith(RESERVED))
metadatas = (
    st.just(b"")
    | st.binary(max_size=50)
    | st.dictionaries(
        st.sampled_from(["partitionKey", "traceparent", "$correlationId", "actor"]),
        names | st.just(TRACE) | st.integers() | st.none(),
    ).map(lambda document: json.dumps(document).encode())
)
events = st.builds(
    RecordedEvent,
    position=st.integers(1, 2**63 - 1),
    stream=names,
    version=st.integers(0, 2**63 - 1),
    type=names,
    data=st.binary(max_size=100),
    metadata=metadatas,
    is_json=st.booleans(),
    id_bytes=st.binary(min_size=16, max_size=16),
    ticks=st.integers(0, 253_402_300_799 * 10_000_000 + 9_999_999),
)


def recorded(metadata: bytes = b"", **changes: Any) -> RecordedEvent:
    whole = RecordedEvent(9, "order-1", 2, "OrderCreated", b'{"a":1}', metadata, True, LOG.bytes, 1_700_000_000_1234567)
    return whole._replace(**changes)


def sent(event: RecordedEvent | None = None, *, seal: Seal | None = None) -> Message:
    event = event or recorded()
    bucket = carried(event)
    assert bucket is not None
    return encode(event, log=LOG, previous=min(4, event.position - 1), bucket=bucket, seal=seal)


def with_header(name: str, value: object) -> Message:
    whole = sent()
    return replace(whole, headers={**whole.headers, name: value})


@given(events, st.data())
def test_every_event_comes_back_as_it_was(event: RecordedEvent, data: st.DataObject) -> None:
    previous = data.draw(st.integers(-1, event.position - 1))
    bucket = bucket_of(partition_key(event))
    whole = encode(event, log=LOG, previous=previous, bucket=bucket)
    assert decode(whole) == (LOG, previous, bucket, event)
    for value in whole.headers.values():
        assert isinstance(value, str | int | bytes)
        if isinstance(value, str):
            value.encode()


def test_properties_and_headers_are_those_of_the_format() -> None:
    metadata = json.dumps({"$correlationId": "c-1", "traceparent": TRACE, "partitionKey": "k"}).encode()
    whole = sent(recorded(metadata))
    assert whole.message_id == str(LOG)
    assert (whole.type, whole.content_type, whole.app_id) == ("OrderCreated", JSON, "tidings")
    assert (whole.correlation_id, whole.bucket) == ("c-1", bucket_of("k"))
    assert whole.body == b'{"a":1}'
    assert dict(whole.headers) == {
        "cloudEvents_id": str(LOG),
        "cloudEvents_source": f"/tidings/{LOG}",
        "cloudEvents_type": "OrderCreated",
        "cloudEvents_specversion": "1.0",
        "cloudEvents_time": "2023-11-14T22:13:20.1234567Z",
        "cloudEvents_subject": "order-1",
        "cloudEvents_partitionkey": "k",
        "tidings-log": str(LOG),
        "tidings-position": 9,
        "tidings-previous": 4,
        "tidings-version": 2,
        "tidings-bucket": bucket_of("k"),
        "tidings-metadata": metadata,
        "traceparent": TRACE,
    }


def test_octets_and_absent_metadata_stay_what_they_are() -> None:
    event = recorded(data=b"\x00\xff", is_json=False)
    whole = sent(event)
    assert whole.content_type == OCTETS
    assert "tidings-metadata" not in whole.headers
    assert decode(whole).event == event


def test_metadata_is_read_as_text_too() -> None:
    """Some clients turn a byte header that is UTF-8 into text."""
    event = recorded(b'{"actor":"\xc3\xa9"}')
    whole = sent(event)
    assert decode(replace(whole, headers={**whole.headers, "tidings-metadata": '{"actor":"é"}'})).event == event


def test_metadata_text_that_is_no_unicode_is_still_only_metadata() -> None:
    assert decode(with_header("tidings-metadata", "\ud800")).event.metadata == b"\xed\xa0\x80"


numbers = st.integers(-3, 3) | st.sampled_from([2**63 - 1, 2**63, 2**64 - 1]) | st.integers()
anything = st.text(st.characters()) | st.sampled_from(["", "$x", "tidings_x", "\ud800", "order-1"])


@given(
    st.builds(
        RecordedEvent,
        position=numbers,
        stream=anything,
        version=numbers,
        type=anything,
        data=st.sampled_from([b"", b"{}", bytes(BODY_LIMIT), bytes(BODY_LIMIT + 1)]),
        metadata=metadatas,
        is_json=st.booleans(),
        id_bytes=st.binary(min_size=16, max_size=16),
        ticks=numbers | st.sampled_from([253_402_300_800 * 10_000_000 - 1, 253_402_300_800 * 10_000_000]),
    ),
    numbers,
)
def test_whatever_the_log_holds_what_is_encoded_can_be_decoded(event: RecordedEvent, previous: int) -> None:
    bucket = bucket_of(partition_key(event))
    try:
        whole = encode(event, log=LOG, previous=previous, bucket=bucket)
    except MalformedMessage as refused:
        str(refused).encode()
        return
    assert decode(whole) == (LOG, previous, bucket, event)


@given(st.uuids(), numbers, numbers, st.dictionaries(st.integers(-1, BUCKETS), numbers, max_size=3))
def test_whatever_a_relay_believes_a_marker_that_is_encoded_can_be_decoded(
    log: UUID, position: int, base: int, touched: dict[int, int]
) -> None:
    marker = Marker(log, position, base, touched)
    try:
        whole = marker.encode()
    except MalformedMessage:
        return
    assert Marker.decode(whole) == marker


BAD_HEADERS: list[tuple[str, object]] = [
    ("tidings-position", None),
    ("tidings-position", "9"),
    ("tidings-position", 9.0),
    ("tidings-position", True),
    ("tidings-position", 0),
    ("tidings-position", -1),
    ("tidings-position", 2**63),
    ("tidings-position", 10**5000),
    ("tidings-previous", None),
    ("tidings-previous", 9),
    ("tidings-previous", 10),
    ("tidings-previous", -2),
    ("tidings-previous", False),
    ("tidings-bucket", None),
    ("tidings-bucket", BUCKETS),
    ("tidings-bucket", -1),
    ("tidings-bucket", 238),
    ("tidings-version", -1),
    ("tidings-version", "0"),
    ("tidings-log", None),
    ("tidings-log", "no uuid"),
    ("tidings-log", LOG),
    ("tidings-metadata", 7),
    ("tidings-metadata", {"actor": "x"}),
    ("cloudEvents_id", "g" * 32),
    ("cloudEvents_id", b"x"),
    ("cloudEvents_subject", ""),
    ("cloudEvents_subject", b"order-1"),
    ("cloudEvents_partitionkey", "another"),
    ("cloudEvents_partitionkey", None),
    ("cloudEvents_type", None),
    ("cloudEvents_time", None),
    ("cloudEvents_time", "yesterday"),
    ("cloudEvents_time", "2023-13-14T22:13:20.1234567Z"),
    ("cloudEvents_time", "2023-11-14T22:13:20.123456Z"),
    ("cloudEvents_time", "2023-11-14T22:13:20.1234567+01:00"),
    ("cloudEvents_time", "2023-11-14T22:13:20.123456\N{ARABIC-INDIC DIGIT SEVEN}Z"),
    ("cloudEvents_time", 1_700_000_000),
]


def _shown(value: object) -> str:
    return value if isinstance(value, str) and value.isascii() else type(value).__name__


@pytest.mark.parametrize(("name", "value"), BAD_HEADERS, ids=_shown)
def test_a_bad_header_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(MalformedMessage) as refused:
        decode(with_header(name, value))
    shown = str(refused.value)
    assert name in shown or (name == "cloudEvents_partitionkey" and "partition key" in shown)
    assert len(shown) < 250


@pytest.mark.parametrize(
    "name", [name for name in sent().headers if name not in ("cloudEvents_source", "cloudEvents_specversion")]
)
def test_a_missing_header_is_refused_by_name(name: str) -> None:
    whole = sent()
    headers = {key: value for key, value in whole.headers.items() if key != name}
    with pytest.raises(MalformedMessage, match=name):
        decode(replace(whole, headers=headers))


def test_a_message_of_somebody_else_is_called_so() -> None:
    with pytest.raises(MalformedMessage, match="Tidings' relay did not send this message"):
        decode(Message(b"hello", "1", "greeting"))


def test_a_body_over_the_limit_is_refused() -> None:
    assert decode(replace(sent(), body=bytes(BODY_LIMIT))).event.data == bytes(BODY_LIMIT)
    with pytest.raises(MalformedMessage, match=str(BODY_LIMIT)):
        decode(replace(sent(), body=bytes(BODY_LIMIT + 1)))


def test_another_content_type_is_refused() -> None:
    with pytest.raises(MalformedMessage, match="text/plain"):
        decode(replace(sent(), content_type="text/plain"))


odd = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.builds(lambda digits: 10**digits, st.integers(4000, 5000))
    | st.floats()
    | st.text()
    | st.characters(categories=["Cs"])
    | st.binary()
    | st.binary().map(bytearray)
    | st.uuids()
    | st.datetimes(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(sorted(sent(recorded(b"{}")).headers)), odd, max_size=3), st.booleans())
def test_whatever_the_headers_hold_decoding_returns_or_refuses(changes: dict[str, object], keep: bool) -> None:
    whole = sent(recorded(b"{}"))
    try:
        decode(replace(whole, headers={**(whole.headers if keep else {}), **changes}))
    except MalformedMessage as refused:
        str(refused).encode()


# ---- markers -------------------------------------------------------------------------

positions = st.integers(-1, 2**63 - 1)
markers = st.builds(
    Marker, st.uuids(), positions, positions, st.dictionaries(st.integers(0, BUCKETS - 1), st.integers(0, 2**63 - 1))
)


@given(markers)
def test_every_marker_comes_back_as_it_was(marker: Marker) -> None:
    whole = marker.encode()
    assert (whole.type, whole.bucket) == (MARKER, None)
    assert Marker.decode(whole) == marker


def test_a_marker_that_touched_every_bucket_is_below_its_limit() -> None:
    marker = Marker(LOG, 2**63 - 1, 2**63 - 1, dict.fromkeys(range(BUCKETS), 2**63 - 1))
    assert Marker.decode(marker.encode()) == marker


BAD_MARKERS: dict[str, Any] = {
    "no object": [],
    "no log": {"log": None},
    "log no UUID": {"log": "x"},
    "position no number": {"position": "7"},
    "position a bool": {"position": True},
    "position negative": {"position": -2},
    "position over 63 bits": {"position": 2**63},
    "base missing": {"base": None},
    "base negative": {"base": -2},
    "touched no object": {"touched": [1]},
    "touched a text": {"touched": "12"},
    "touched none": {"touched": None},
    "touched bucket no number": {"touched": {"x": 1}},
    "touched bucket over": {"touched": {"256": 1}},
    "touched bucket negative": {"touched": {"-1": 1}},
    "touched position a text": {"touched": {"1": "1"}},
    "touched position negative": {"touched": {"1": -1}},
}


@pytest.mark.parametrize("change", BAD_MARKERS.values(), ids=BAD_MARKERS)
def test_a_bad_marker_is_refused(change: Any) -> None:
    body = {"log": str(LOG), "position": 7, "base": 3, "touched": {"0": 5}}
    body = body | change if isinstance(change, dict) else change
    with pytest.raises(MalformedMessage):
        Marker.decode(Message(json.dumps(body).encode(), "m", MARKER))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff",
        b"[" * 16_000,
        b'{"touched":' * 1_400,
        b'{"touched":{"0":' + b"9" * 9_000 + b"}}",
        b'{"touched":{"' + b"9" * 9_000 + b'":1}}',
        b" " * (64 * BUCKETS + 1),
        b'{"log":"\\ud800"}',
    ],
    ids=["empty", "cut", "no utf-8", "lists", "objects", "giant position", "giant bucket", "too long", "surrogate"],
)
def test_bombs_in_a_marker_are_refused_shortly(body: bytes) -> None:
    with pytest.raises(MalformedMessage) as refused:
        Marker.decode(Message(body, "m", MARKER))
    assert len(str(refused.value)) < 300


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.binary()
    | json_values.map(lambda value: json.dumps(value).encode())
    | st.fixed_dictionaries(
        {"log": json_values, "position": json_values, "base": json_values, "touched": json_values}
    ).map(lambda value: json.dumps(value).encode())
)
def test_whatever_a_markers_body_is_decoding_returns_or_refuses(body: bytes) -> None:
    try:
        Marker.decode(Message(body, "m", MARKER))
    except MalformedMessage as refused:
        str(refused).encode()


def test_the_module_says_what_it_offers() -> None:
    assert all(hasattr(message, name) for name in message.__all__)
