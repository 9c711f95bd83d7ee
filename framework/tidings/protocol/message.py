"""The wire format between relay and services: CloudEvents in AMQP headers, the event's data untouched as the body.

It knows no broker: an adapter moves `Message` objects; this module says what they mean and refuses what it cannot read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final, NamedTuple
from uuid import UUID

from tidings._support.json_limits import parse
from tidings.errors import MalformedMessage
from tidings.protocol.position import BUCKETS, RESERVED, bucket_of, partition_key
from tidings.protocol.seal import HEADER, Seal
from tidings.stores import EPOCH, JSON, OCTETS, RecordedEvent

__all__ = ["BODY_LIMIT", "MARKER", "Marker", "Message", "Stamped", "decode", "encode"]

MARKER: Final = "tidings.marker"
BODY_LIMIT: Final = 16 * 1024 * 1024
"""Bytes: no event in EventStoreDB is larger, so nothing larger is an event."""

_SPECVERSION: Final = "1.0"
_TRACEPARENT: Final = re.compile(rb'"traceparent"\s*:\s*"([0-9a-f-]{55})"')
_CORRELATION: Final = re.compile(rb'"\$correlationId"\s*:\s*"([^"\\]{1,255})"')
_MOMENT: Final = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)\.(\d{7})Z", re.ASCII)


@dataclass(frozen=True, slots=True)
class Message:
    """What a bus carries, always persistent. Header values are strings, integers and bytes.

    AMQP short strings end at 255 bytes (AMQP 0-9-1, section 4.2.5.3): an adapter leaves out properties that are longer,
    because every fact stands in the headers too.
    """

    body: bytes
    message_id: str
    type: str
    headers: Mapping[str, Any] = field(default_factory=dict)
    content_type: str = JSON
    correlation_id: str | None = None
    app_id: str | None = None
    bucket: int | None = None
    """For routing: an event's bucket; None for a marker, which goes to every partition."""


class Stamped(NamedTuple):
    """An event as a message brings it: the log's record, with the stamps that prove order and completeness."""

    log: UUID
    previous: int
    bucket: int
    event: RecordedEvent


def encode(event: RecordedEvent, *, log: UUID, previous: int, bucket: int, seal: Seal | None = None) -> Message:
    """Return the message that carries `event`, sealed where there is a seal.

    Raises `MalformedMessage` for an event whose message `decode` would refuse: nothing is published that no service
    could read. `bucket` is that of the event's partition key, as `carried` has computed it.
    """
    metadata = event.metadata
    _check_stamps(event, previous, bucket)
    identifier = str(event.id)
    headers: dict[str, Any] = {
        "cloudEvents_id": identifier,
        "cloudEvents_source": f"/tidings/{log}",
        "cloudEvents_type": event.type,
        "cloudEvents_specversion": _SPECVERSION,
        "cloudEvents_time": _moment(event.ticks),
        "cloudEvents_subject": event.stream,
        "cloudEvents_partitionkey": partition_key(event),
        "tidings-log": str(log),
        "tidings-position": event.position,
        "tidings-previous": previous,
        "tidings-version": event.version,
        "tidings-bucket": bucket,
    }
    if metadata:
        headers["tidings-metadata"] = metadata
    if seal is not None:
        headers[HEADER] = seal.of(event.type, event.content_type, headers, event.data)
    correlation = None
    if b'"traceparent"' in metadata and (found := _TRACEPARENT.search(metadata)):
        headers["traceparent"] = found[1].decode("ascii")
    if found := _CORRELATION.search(metadata):
        correlation = found[1].decode("utf-8", "replace")
    return Message(
        body=event.data,
        message_id=identifier,
        type=event.type,
        headers=headers,
        content_type=event.content_type,
        correlation_id=correlation,
        app_id="tidings",
        bucket=bucket,
    )


def _check_stamps(event: RecordedEvent, previous: int, bucket: int) -> None:
    """Apply the rules of `decode` that an event can break; the others hold for whatever `encode` makes of it."""
    if not (
        -1 <= previous < event.position <= _BIGGEST
        and event.position > 0
        and 0 <= event.version <= _BIGGEST
        and 0 <= bucket < BUCKETS
        and 0 <= event.ticks <= _LAST_TICK
        and len(event.data) <= BODY_LIMIT
    ):
        raise MalformedMessage(
            f"position {event.position}, previous {previous}, version {event.version}, bucket {bucket}, "
            f"{event.ticks} ticks, {len(event.data)} bytes: one of them is outside what a message may say"
        )
    for name in (event.stream, event.type):
        if not name or name.startswith(RESERVED) or not name.isascii():
            _name({"name": name}, "name")


def decode(message: Message) -> Stamped:
    """Read an event back. Raises `MalformedMessage` that names the header which cannot be what Tidings wrote."""
    headers = message.headers
    if len(message.body) > BODY_LIMIT:
        raise MalformedMessage(f"the body is {len(message.body)} bytes, no event is over {BODY_LIMIT}")
    if "tidings-position" not in headers:
        raise MalformedMessage("header 'tidings-position' is missing: Tidings' relay did not send this message")
    position = _integer(headers, "tidings-position", 1)
    previous = _integer(headers, "tidings-previous", -1)
    if previous >= position:
        raise MalformedMessage(f"header 'tidings-previous' is {previous}, not below the position {position}")
    bucket = _integer(headers, "tidings-bucket", 0, BUCKETS - 1)
    stream = _name(headers, "cloudEvents_subject")
    key = _text(headers, "cloudEvents_partitionkey")
    if bucket_of(key) != bucket:
        raise MalformedMessage(
            f"header 'tidings-bucket' is {bucket}, but the partition key belongs to {bucket_of(key)}"
        )
    metadata = headers.get("tidings-metadata", b"")
    if isinstance(metadata, str):
        metadata = metadata.encode("utf-8", "surrogatepass")
    if not isinstance(metadata, bytes | bytearray):
        raise MalformedMessage(f"header 'tidings-metadata' is {type(metadata).__name__}, not bytes")
    if message.content_type not in (JSON, OCTETS):
        raise MalformedMessage(f"the content type is {message.content_type!r}, not {JSON} or {OCTETS}")
    event = RecordedEvent(
        position=position,
        stream=stream,
        version=_integer(headers, "tidings-version", 0),
        type=_name(headers, "cloudEvents_type"),
        data=message.body,
        metadata=bytes(metadata),
        is_json=message.content_type == JSON,
        id_bytes=_uuid(headers, "cloudEvents_id").bytes,
        ticks=_ticks(_text(headers, "cloudEvents_time")),
    )
    return Stamped(_uuid(headers, "tidings-log"), previous, bucket, event)


class Marker(NamedTuple):
    """The relay's pulse: published up to `position`; since the marker for `base` these buckets were `touched`."""

    log: UUID
    position: int
    base: int
    touched: Mapping[int, int]
    """Bucket to the position of its last event in (base, position]."""

    def encode(self, seal: Seal | None = None) -> Message:
        """Raises `MalformedMessage` for a marker that `decode` would refuse."""
        body = {
            "log": str(self.log),
            "position": self.position,
            "base": self.base,
            "touched": {str(bucket): at for bucket, at in self.touched.items()},
        }
        data = json.dumps(body, separators=(",", ":")).encode()
        message = Message(
            body=data,
            message_id=f"marker-{self.log}-{self.position}",
            headers={} if seal is None else {HEADER: seal.of(MARKER, JSON, {}, data)},
            type=MARKER,
            app_id="tidings",
        )
        self.decode(message)  # at most one marker a second: reading it back is the whole proof
        return message

    @classmethod
    def decode(cls, message: Message) -> Marker:
        """Raises `MalformedMessage` for a body that is no marker's."""
        if len(message.body) > 64 * BUCKETS:
            raise MalformedMessage(f"a marker of {len(message.body)} bytes is none of ours")
        try:
            body = parse(message.body)
            touched = {_BUCKETS[bucket]: _integer(body["touched"], bucket, 0) for bucket in body["touched"]}
            return cls(_uuid(body, "log"), _integer(body, "position", -1), _integer(body, "base", -1), touched)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MalformedMessage(
                f"a marker's body cannot be read: {type(error).__name__} {_shown(str(error))}"
            ) from error


_BIGGEST: Final = 2**63 - 1
_LAST_TICK: Final = 253_402_300_800 * 10_000_000 - 1
"""The last 100 ns of the year 9999, after which a time has no RFC 3339 form."""
_BUCKETS: Final = {str(bucket): bucket for bucket in range(BUCKETS)}
"""Each in the one way in which markers write it."""


def _integer(values: Mapping[str, Any], name: str, low: int, high: int = _BIGGEST) -> int:
    value = values.get(name)
    if type(value) is not int:
        raise MalformedMessage(f"{_shown(name)} is {_shown(value)}, not an integer")
    if not low <= value <= high:
        raise MalformedMessage(f"{_shown(name)} is {_shown(value)}, outside {low} to {high}")
    return value


def _text(values: Mapping[str, Any], name: str) -> str:
    value = values.get(name)
    if not isinstance(value, str) or not value:
        raise MalformedMessage(f"{name!r} is {_shown(value)}, not a text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise MalformedMessage(f"{name!r} is {_shown(value)}, which UTF-8 cannot express") from None
    return value


def _name(values: Mapping[str, Any], name: str) -> str:
    text = _text(values, name)
    if text.startswith(RESERVED):
        raise MalformedMessage(f"{name!r} is {_shown(text)}: names that begin so are reserved, and never carried")
    return text


def _uuid(values: Mapping[str, Any], name: str) -> UUID:
    text = _text(values, name)
    try:
        return UUID(text)
    except ValueError:
        raise MalformedMessage(f"{name!r} is {_shown(text)}, not a UUID") from None


def _shown(value: object) -> str:
    """A foreign value, short and without control characters, for an error."""
    try:
        return "missing" if value is None else ascii(value)[:80]
    except (ValueError, RecursionError):  # an integer of thousands of digits, a table nested too deep
        return f"a {type(value).__name__}"


def _moment(ticks: int) -> str:
    """RFC 3339 with all seven digits of the store's 100 ns, because AMQP's own timestamp has whole seconds."""
    seconds, fraction = divmod(ticks, 10_000_000)
    return f"{_second(seconds)}.{fraction:07d}Z"


@lru_cache(maxsize=64)
def _second(seconds: int) -> str:
    """Events come in the order of time, and many in one second."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}"


def _ticks(moment: str) -> int:
    found = _MOMENT.fullmatch(moment)
    try:
        if found is None:
            raise ValueError
        seconds = datetime.fromisoformat(found[1]).replace(tzinfo=UTC) - EPOCH
    except ValueError:
        raise MalformedMessage(f"'cloudEvents_time' is {_shown(moment)}, not a time as Tidings writes it") from None
    return (seconds.days * 86_400 + seconds.seconds) * 10_000_000 + int(found[2])
