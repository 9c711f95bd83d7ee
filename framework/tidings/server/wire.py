"""Between EventStoreDB's messages and the store's events: names, versions, identifiers. It does no I/O."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final
from uuid import UUID

from tidings.server.protocol import packed, persistent, shared, streams
from tidings.server.refusals import invalid_argument, missing_metadata, shown, thrown
from tidings.stores import ANY, JSON, NO_STREAM, OCTETS, STREAM_EXISTS, EventData, Expected, RecordedEvent, StreamState
from tidings.stores.rules import MAX_VERSION

__all__ = [
    "Malformed",
    "NAME",
    "OVERHEAD",
    "Resolved",
    "check_length",
    "encoder",
    "cost_of",
    "event_data",
    "expected_code",
    "expected_version",
    "group_encoder",
    "stream_name",
    "uuid_of",
    "written_name",
]

Resolved = tuple[RecordedEvent | None, RecordedEvent | None]
"""An event and the link that led to it; a link whose target is gone has no event."""


class Malformed(ValueError):
    """A part of a request that cannot be meant; the text is what EventStoreDB says of it."""


# ---- requests ----------------------------------------------------------------------

NAME: Final = 1024
"""Bytes of the name of a stream that is written, without the `$$` of its metadata's."""
OVERHEAD: Final = 512
"""Bytes that an event takes beside its data, metadata and type."""


def stream_name(identifier: shared.StreamIdentifier) -> str:
    """Raises `Malformed` for an empty name and for bytes that are no UTF-8."""
    if not identifier.stream_name:
        raise Malformed("Value cannot be null. (Parameter 'value')")
    try:
        return identifier.stream_name.decode()
    except UnicodeDecodeError:
        raise Malformed("The stream name is not valid UTF-8.") from None


def written_name(identifier: shared.StreamIdentifier) -> str:
    """As `stream_name`, of a stream that is to be written. Raises `Refusal` for a name that is too long."""
    name = stream_name(identifier)
    check_length(name)
    return name


def check_length(name: str) -> None:
    """Raise `Refusal` for the name of a stream that is too long to be written: every event of it repeats its name."""
    size = len(name.removeprefix("$$").encode("utf-8", "replace"))
    if size > NAME:
        raise invalid_argument(f"The name of stream '{shown(name)}' has {size} bytes, and {NAME} is the most.")


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


def cost_of(event: EventData) -> int:
    """Return the bytes that an event counts for: an event without data takes memory, too."""
    return event.size + OVERHEAD


# ---- answers -----------------------------------------------------------------------

Encode = Callable[[Resolved], bytes]

REUSED_BYTES: Final = 64 * 1024
"""Bytes of events after which the message that answers are made in is replaced by a new one."""


def _filler(structured: bool) -> Callable[[Any, RecordedEvent], None]:
    """Return what writes an event into a recorded-event message, of which each service has its own class."""

    def fill(record: Any, event: RecordedEvent) -> None:
        id_ = event.id_bytes
        if structured:
            halves = record.id.structured
            halves.most_significant_bits = int.from_bytes(id_[:8], signed=True)
            halves.least_significant_bits = int.from_bytes(id_[8:], signed=True)
        else:
            digits = id_.hex()
            record.id.string = f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"
        record.stream_identifier.stream_name = event.stream.encode()
        record.stream_revision = event.version
        record.prepare_position = record.commit_position = event.position
        metadata = record.metadata
        metadata["type"] = event.type
        metadata["content-type"] = event.content_type
        metadata["created"] = str(event.ticks)
        record.custom_metadata = event.metadata
        record.data = event.data

    return fill


def _answerer(kind: Any, structured: bool) -> Callable[[Resolved], Any]:
    """Return what makes the answer of class `kind` about one event; the next call may change the same message.

    A message that is filled again is packed in 2.5 µs. Making a new one, with its five inner ones, took 19 µs, more
    than everything else that the server does for an event. But protobuf frees what a message ever held only with the
    message, so another one is begun after some kilobytes.
    """
    fill = _filler(structured)
    reused, held = kind(), 0

    def answer(resolved: Resolved) -> Any:
        nonlocal reused, held
        event, link = resolved
        original = link or event
        if original is None:
            raise thrown()
        held += len(original.data) + len(original.metadata) + OVERHEAD
        if held > REUSED_BYTES:
            reused, held = kind(), 0
        answer = reused if link is None else kind()
        if event is not None:
            fill(answer.event.event, event)
        if link is not None:
            fill(answer.event.link, link)
        answer.event.commit_position = original.position
        return answer

    return answer


def encoder(structured: bool) -> Encode:
    """Return what packs an event as an answer of `Streams.Read`."""
    answer = _answerer(streams.ReadResp, structured)
    return lambda resolved: packed(answer(resolved))


def group_encoder(structured: bool) -> Callable[[Resolved, int], bytes]:
    """Return what packs an event as an answer of `PersistentSubscriptions.Read`, with how often it was retried."""
    answer = _answerer(persistent.ReadResp, structured)

    def encode(resolved: Resolved, retries: int) -> bytes:
        message = answer(resolved)
        message.event.retry_count = retries
        return packed(message)

    return encode
