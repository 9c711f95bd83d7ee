"""Between EventStoreDB's messages and the store's events: names, versions, identifiers. It does no I/O."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final
from uuid import UUID

from tidings.server.protocol import packed, persistent, shared, streams
from tidings.server.refusals import missing_metadata, thrown
from tidings.stores import ANY, JSON, NO_STREAM, OCTETS, STREAM_EXISTS, EventData, Expected, RecordedEvent, StreamState
from tidings.stores.rules import MAX_VERSION

__all__ = [
    "Malformed",
    "Resolved",
    "encoder",
    "event_data",
    "expected_code",
    "expected_version",
    "group_encoder",
    "stream_name",
    "uuid_of",
]

Resolved = tuple[RecordedEvent | None, RecordedEvent | None]
"""An event and the link that led to it; a link whose target is gone has no event."""


class Malformed(ValueError):
    """A part of a request that cannot be meant; the text is what EventStoreDB says of it."""


# ---- requests ----------------------------------------------------------------------


def stream_name(identifier: shared.StreamIdentifier) -> str:
    """Raises `Malformed` for an empty name and for bytes that are no UTF-8."""
    if not identifier.stream_name:
        raise Malformed("Value cannot be null. (Parameter 'value')")
    try:
        return identifier.stream_name.decode()
    except UnicodeDecodeError:
        raise Malformed("The stream name is not valid UTF-8.") from None


def uuid_of(value: shared.UUID) -> UUID:
    """Text, or two signed numbers of 64 bits. Raises `Malformed`."""
    kind = value.WhichOneof("value")
    if kind == "structured":
        high, low = value.structured.most_significant_bits, value.structured.least_significant_bits
        return UUID(int=(high % 2**64) << 64 | low % 2**64)
    try:
        return UUID(value.string)
    except ValueError:
        raise Malformed("Guid should contain 32 digits with 4 dashes (xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx).") from None


_STATES: Final[dict[str | None, StreamState]] = {"no_stream": NO_STREAM, "any": ANY, "stream_exists": STREAM_EXISTS}
_CODES: Final[dict[Expected, int]] = {NO_STREAM: -1, ANY: -2, STREAM_EXISTS: -4}


def expected_version(options: Any, oneof: str = "expected_stream_revision", field: str = "revision") -> Expected:
    """Of any request that has one. Raises `Malformed` when it is missing, or a number that no stream reaches."""
    kind = options.WhichOneof(oneof)
    if kind == field:
        version = int(getattr(options, field))
        if version > MAX_VERSION:
            raise Malformed(f"'{version}' is not a valid stream revision")
        return version
    try:
        return _STATES[kind]
    except KeyError:
        raise Malformed("'None' is not a valid expected stream revision") from None


def expected_code(expected: Expected) -> int:
    """As EventStoreDB's errors number it."""
    return expected if isinstance(expected, int) else _CODES[expected]


def event_data(proposed: Any) -> EventData:
    """An event to append. Raises `Malformed`, and `Refusal` for missing metadata."""
    metadata = proposed.metadata
    for name in ("type", "content-type"):
        if name not in metadata:
            raise missing_metadata(name)
    id_ = uuid_of(proposed.id)
    if not id_.int:
        raise Malformed("Empty eventId provided. (Parameter 'eventId')")
    type_ = metadata["type"]
    if not type_:
        raise Malformed("Empty eventType provided. (Parameter 'eventType')")
    content_type = JSON if metadata["content-type"] == JSON else OCTETS
    return EventData(type_, proposed.data, proposed.custom_metadata, content_type, id_)


# ---- answers -----------------------------------------------------------------------

Encode = Callable[[Resolved], bytes]


def _recorder(kind: Any, structured: bool) -> Callable[[RecordedEvent], Any]:
    """How an event becomes a message; `kind` is the message class, of which each service has its own."""

    def message(event: RecordedEvent) -> Any:
        return kind(
            id=_structured(event.id_bytes) if structured else shared.UUID(string=str(event.id)),
            stream_identifier=shared.StreamIdentifier(stream_name=event.stream.encode()),
            stream_revision=event.version,
            prepare_position=event.position,
            commit_position=event.position,
            metadata={"type": event.type, "content-type": event.content_type, "created": str(event.ticks)},
            custom_metadata=event.metadata,
            data=event.data,
        )

    return message


def _structured(id_: bytes) -> shared.UUID:
    high, low = (int.from_bytes(half, signed=True) for half in (id_[:8], id_[8:]))
    return shared.UUID(structured=shared.UUID.Structured(most_significant_bits=high, least_significant_bits=low))


def encoder(structured: bool) -> Encode:
    """How an event becomes an answer of `Streams.Read`, in bytes."""
    kind = streams.ReadResp.ReadEvent
    record = _recorder(kind.RecordedEvent, structured)

    def encode(resolved: Resolved) -> bytes:
        event, link = resolved
        original = link or event
        if original is None:
            raise thrown()
        answer = kind(
            event=None if event is None else record(event),
            link=None if link is None else record(link),
            commit_position=original.position,
        )
        return packed(streams.ReadResp(event=answer))

    return encode


def group_encoder(structured: bool) -> Callable[[Resolved, int], bytes]:
    """How an event becomes an answer of `PersistentSubscriptions.Read`; the number says how often it was retried."""
    kind = persistent.ReadResp.ReadEvent
    record = _recorder(kind.RecordedEvent, structured)

    def encode(resolved: Resolved, retries: int) -> bytes:
        event, link = resolved
        original = link or event
        if original is None:
            raise thrown()
        answer = kind(
            event=None if event is None else record(event),
            link=None if link is None else record(link),
            commit_position=original.position,
            retry_count=retries,
        )
        return packed(persistent.ReadResp(event=answer))

    return encode
