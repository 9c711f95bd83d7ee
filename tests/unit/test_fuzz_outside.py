"""Every parser that faces the outside gives a value or the error that is documented: for what comes from a broker, from
the log, and from a command line."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from tests.unit.command_line import OrderCreated, Poisoned, invoke, run_shop
from tidings.buses.rabbitmq.content import Properties, pack, unpack
from tidings.buses.rabbitmq.messages import message_of
from tidings.errors import MalformedMessage, StoreUnavailable
from tidings.modelling.codec import read_metadata
from tidings.protocol.message import MARKER, Marker, Message, Stamped, decode, encode
from tidings.protocol.position import BUCKETS, bucket_of, carried, partition_key
from tidings.relay.checkpoints import read_checkpoint
from tidings.stores import EventStore, RecordedEvent

LOG = UUID(int=7)
BIGGEST = 2**63 - 1

hostile_integers = (
    st.sampled_from(
        [-(2**64), -(2**63), -2, -1, 0, 1, 255, 256, 2**31, 2**53 + 1, BIGGEST, 2**63, 2**64, 10**30, 10**4000]
    )
    | st.integers()
)
json_values = st.recursive(
    st.none() | st.booleans() | hostile_integers.filter(lambda n: abs(n) < 10**4000) | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3) | st.sampled_from(["partitionKey", "position"]), inner, max_size=3)
    ),
    max_leaves=6,
)
documents = (
    st.binary(max_size=60)
    | json_values.map(lambda value: json.dumps(value).encode())
    | st.tuples(st.sampled_from([b"[", b'{"a":', b'{"position":', b'{"partitionKey":']), st.integers(0, 3000)).map(
        lambda p: p[0] * p[1]
    )
    | st.sampled_from(
        [b"NaN", b"1e999", b"9" * 5000, b'{"position":NaN}', b'{"position":1e3}', b"\xef\xbb\xbf{}", b"\x00"]
    )
)


def recorded(metadata: bytes = b"", data: bytes = b"{}") -> RecordedEvent:
    return RecordedEvent(
        5, "order-1", 0, "OrderCreated", data, metadata, True, UUID(int=9).bytes, 17_000_000_000_000_000
    )


# ---- from the broker -------------------------------------------------------------------


def whole() -> Message:
    event = recorded(b'{"partitionKey":"k","schemaVersion":1}')
    return encode(event, log=LOG, previous=3, bucket=bucket_of("k"))


def read(message: Message) -> Stamped | Marker | None:
    """Decode a message as the intake does. Return None if it is refused."""
    try:
        if message.type == MARKER and "tidings-position" not in message.headers:
            return Marker.decode(message)
        return decode(message)
    except MalformedMessage as error:
        refused = str(error)
    assert refused.isprintable()
    return None


values = st.text(max_size=20) | st.binary(max_size=20) | hostile_integers.filter(lambda n: -(2**63) <= n < 2**63)


@given(
    changes=st.dictionaries(
        st.sampled_from(sorted(whole().headers)) | st.text(min_size=1, max_size=9), values, max_size=4
    ),
    flips=st.lists(st.tuples(st.integers(0, 5_000), st.integers(1, 255)), max_size=6),
    cut=st.integers(0, 60),
    marker=st.booleans(),
    body=documents,
)
@settings(deadline=None)
def test_whatever_a_broker_delivers_is_a_message_of_ours_or_malformed(
    changes: dict[str, Any], flips: list[tuple[int, int]], cut: int, marker: bool, body: bytes
) -> None:
    """From the bytes of a content header to event or marker."""
    good = whole()
    headers = {} if marker else {**good.headers, **changes}
    kind = MARKER if marker else good.type
    payload = bytearray(pack(Properties(headers, good.content_type, None, good.message_id, kind, None), len(body)))
    for at, flip in flips:
        payload[at % len(payload)] ^= flip
    found = read(message_of(unpack(bytes(payload[: len(payload) - cut if cut < 30 else None])), body))
    if isinstance(found, Stamped):
        assert -1 <= found.previous < found.event.position <= BIGGEST
        assert 0 <= found.event.version <= BIGGEST
        assert 0 <= found.bucket < BUCKETS
        found.event.stream.encode()
        found.event.type.encode()
        assert carried(found.event) is not None
        assert found.event.recorded_at.year > 0
    elif isinstance(found, Marker):
        assert all(0 <= bucket < BUCKETS and 0 <= at <= BIGGEST for bucket, at in found.touched.items())


@pytest.mark.parametrize("name", ["cloudEvents_subject", "cloudEvents_type", "cloudEvents_partitionkey"])
def test_a_text_that_no_database_could_keep_is_refused(name: str) -> None:
    """No AMQP library yields such a value, but another bus may."""
    changed = {name: "a\ud800", "tidings-bucket": bucket_of("a\ud800" if name.endswith("key") else "k")}
    message = replace(whole(), headers={**whole().headers, **changed})
    with pytest.raises(MalformedMessage, match="UTF-8"):
        decode(message)


@given(st.sampled_from(["01", "+1", " 1", "1 ", "1_0", "\u0661", "1.0", "-0", "0x1", "1e0", "256", ""]) | st.text())
@settings(deadline=None)
def test_a_marker_names_buckets_in_one_way_only(name: str) -> None:
    assume(name not in {str(bucket) for bucket in range(BUCKETS)})
    body = {"log": str(LOG), "position": 7, "base": 3, "touched": {name: 5}}
    assert read(Message(json.dumps(body).encode(), "m", MARKER)) is None


# ---- from the log ----------------------------------------------------------------------


@given(documents)
@example(b'{"partitionKey":"' + b'\\"' * 100_000)
@example(b'{"partitionKey":' + b'{"partitionKey":' * 100_000)
@example(b'{"partitionKey":"\\ud800"}')
@example(b'{"partitionKey":' + b"9" * 5_000 + b"}")
@settings(deadline=None)
def test_metadata_is_a_document_or_empty_and_every_event_has_a_key(metadata: bytes) -> None:
    event = recorded(metadata)
    document = read_metadata(event)
    assert isinstance(document, dict)
    key = partition_key(event)
    assert key
    key.encode()
    assert carried(event) == bucket_of(key)
    message = encode(event, log=LOG, previous=1, bucket=bucket_of(key))
    stamped = read(message)
    assert isinstance(stamped, Stamped)
    assert stamped.event == event


class OneEvent:
    """A store in which every stream ends with one given event."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def read_stream(self, stream: str, *, backwards: bool, limit: int) -> AsyncIterator[RecordedEvent]:
        yield recorded(data=self._data)


@given(documents | json_values.map(lambda value: json.dumps({"position": value}).encode()))
@example(b'{"position":%d}' % BIGGEST)
@example(b'{"position":%d}' % (BIGGEST + 1))
@example(b'{"position":true}')
@example(b'{"position":-2}')
@example(b'{"position":1,"position":-9}')
@settings(deadline=None)
def test_a_checkpoint_is_a_position_or_said_to_be_none(data: bytes) -> None:
    store = cast("EventStore", OneEvent(data))
    with contextlib.suppress(StoreUnavailable):
        assert -1 <= asyncio.run(read_checkpoint(store, "main")) <= BIGGEST


# ---- from the command line ---------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("fuzzed")
    run_shop(made, ("order-1", OrderCreated(order_id="1")), ("bad-1", Poisoned()))
    return made


NUMBERS = [
    ["streams", "list", "--limit={}"],
    ["streams", "show", "order-1", "--from={}"],
    ["streams", "show", "order-1", "--backwards", "--from={}"],
    ["streams", "show", "order-1", "--limit={}"],
    ["streams", "tail", "--lines={}"],
    ["streams", "tail", "order-1", "--lines={}"],
    ["streams", "append", "order-2", "Test", "{{}}", "--expected={}"],
    ["dead", "list", "--limit={}"],
    ["dead", "show", "{}"],
    ["dead", "retry", "--yes", "{}"],
    ["dead", "drop", "--yes", "{}"],
    ["replay", "shop", "--dry-run", "--from={}"],
]
odd_numbers = (
    hostile_integers.filter(lambda n: abs(n) < 10**30).map(str)
    | st.sampled_from(
        ["", "-", "1e3", "٣", "1_000", " 1", "0x10", "NaN", "inf", "9" * 5_000, "2026-02-30", "2026-01-01T25:00"]
    )
    | st.text(max_size=5)
)


@pytest.mark.parametrize("command", NUMBERS, ids=" ".join)
@given(number=odd_numbers)
@settings(deadline=None, max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(number="9223372036854775807")
@example(number="9223372036854775808")
@example(number="9" * 5_000)
@example(number="0001-01-01T00:00:00+23:59")
def test_no_number_on_a_command_line_is_a_defect(
    command: list[str], number: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command line is answered or refused in words, never with the exit code of an unexpected error."""
    for name in ("STORE", "BUS", "DATABASE", "DEBUG"):
        monkeypatch.delenv(f"TIDINGS_{name}", raising=False)
    monkeypatch.setenv("TIDINGS_SERVICES", "tests.unit.command_line:shop")
    monkeypatch.chdir(folder)
    ended = invoke(*(part.format(number) for part in command))
    assert ended.code in (0, 1, 2, 3), ended


@given(
    stream=st.text(),
    kind=st.text(),
    data=st.text() | documents.map(lambda d: d.decode("utf-8", "surrogateescape")),
    metadata=documents.map(lambda d: d.decode("utf-8", "surrogateescape")),
)
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nothing_that_is_appended_by_hand_is_a_defect(
    stream: str, kind: str, data: str, metadata: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIDINGS_SERVICES", "tests.unit.command_line:shop")
    monkeypatch.chdir(folder)
    ended = invoke("streams", "append", f"--metadata={metadata}", "--", stream, kind, data)
    assert ended.code in (0, 1, 2), ended
