"""Between the port's events and EventStoreDB's messages: requests, answers, what an error means. It does no I/O."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final
from uuid import UUID

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from google.protobuf.unknown_fields import UnknownFieldSet  # type: ignore[import-untyped]

from tidings.errors import (
    EventTooLarge,
    StoreError,
    StoreUnavailable,
    StreamDeleted,
    StreamForbidden,
    WrongExpectedVersion,
)
from tidings.stores import (
    ANY,
    JSON,
    NO_STREAM,
    STREAM_EXISTS,
    Appended,
    EventData,
    Expected,
    Filter,
    RecordedEvent,
    check_stream_name,
    check_text,
    describe,
)
from tidings.stores.eventstoredb.protos import StreamState, shared_pb2, streams_pb2
from tidings.stores.rules import MAX_VERSION, check_event

__all__ = [
    "BATCH_APPEND",
    "EVENT_LIMIT",
    "Answer",
    "READ",
    "Response",
    "TimedOut",
    "Undecided",
    "append_request",
    "caught_up_at",
    "check",
    "check_events",
    "check_expected",
    "client_version",
    "number_of",
    "outcome_of",
    "read_all_request",
    "read_stream_request",
    "recorded",
    "refused_deletion",
    "served",
    "signed",
]

READ: Final = "/event_store.client.streams.Streams/Read"
BATCH_APPEND: Final = "/event_store.client.streams.Streams/BatchAppend"

EVENT_LIMIT: Final = 16_000_000
"""Bytes of one append that any server could take; one over its gRPC limit would end the call that all appends share."""

OVERHEAD: Final = 128
"""Bytes that an event takes in a request at most, besides what counts towards its size."""

WINDOW: Final = 32
"""Events of the log between two checkpoints of a filtered subscription."""

Response = streams_pb2.ReadResp
Answer = streams_pb2.BatchAppendResp
_Options = streams_pb2.ReadReq.Options
_Record = streams_pb2.ReadResp.ReadEvent.RecordedEvent

NOTHING: Final = 2**64 - 1
"""Minus one as an unsigned number: what EventStoreDB 24.2 sends as the checkpoint of having read nothing."""

_POSITION: Final = 3
"""The number of a caught-up message's field with the position."""
_ACTUAL: Final = re.compile(r"Actual version: (-?\d+)")
_EMPTY: Final = shared_pb2.Empty()
_TEXT: Final = _Options.UUIDOption(string=_EMPTY)


class Undecided(Exception):
    """The server could not say whether it appended: it lost its leadership on the way, or gives no reason."""


class TimedOut(Undecided):
    """The server did not finish this one append in time. It is slow, or drops a repetition while the first is under way
    (measured on EventStoreDB 24.2: answered after 2 to 3 s). The other appends of the call are not concerned."""


# ---- numbers -------------------------------------------------------------------------


def signed(number: int) -> int:
    """Return a position or revision, which travels unsigned: the largest number is -1, before everything.

    Raises `StoreUnavailable` for one that no log has (over 2^63 - 1), so that it goes no further.
    """
    if number <= MAX_VERSION:
        return number
    if number == NOTHING:
        return -1
    raise _impossible(f"position or revision {number}")


def _impossible(what: str) -> StoreUnavailable:
    return StoreUnavailable(
        f"EventStoreDB answers with {what}, but none is over {MAX_VERSION} (2^63 - 1). Is the address in TIDINGS_STORE "
        "that of an EventStoreDB or KurrentDB, and is nothing between that changes answers?",
        waiting_helps=False,
    )


# ---- what may be asked for -----------------------------------------------------------


def check(stream: str) -> None:
    """Raise `InvalidStreamName` for a name that cannot be sent."""
    check_stream_name(stream)
    check_text(stream)


def check_events(stream: str, events: Sequence[EventData]) -> int:
    """Their size in bytes. Raises `InvalidStreamName` and `EventTooLarge` for what the server would refuse."""
    check(stream)
    size = whole = 0
    for event in events:
        size += event.size
        check_event(stream, event)
        check_text(event.content_type)
        whole += event.size + len(event.content_type) + OVERHEAD
    if whole > EVENT_LIMIT:
        raise EventTooLarge(stream, whole, EVENT_LIMIT, "Tidings' own")
    return size


def check_expected(expected: Expected) -> None:
    """Raise `TypeError` for what is no expected version: found out when it is sent, it would fail its neighbours."""
    if not isinstance(expected, int) and expected not in (ANY, NO_STREAM, STREAM_EXISTS):
        raise TypeError(f"expected={expected!r}: an expected version is an int, ANY, NO_STREAM or STREAM_EXISTS")


# ---- reading -------------------------------------------------------------------------


def read_stream_request(
    stream: str, start: int | None, *, backwards: bool = False, count: int | None = None, subscribe: bool = False
) -> bytes:
    """`start` is inclusive for a read and exclusive for a subscription; None: the beginning, or the end."""
    name = shared_pb2.StreamIdentifier(stream_name=stream.encode())
    if start is not None:
        place = _Options.StreamOptions(stream_identifier=name, revision=min(start, MAX_VERSION))
    elif backwards:
        place = _Options.StreamOptions(stream_identifier=name, end=_EMPTY)
    else:
        place = _Options.StreamOptions(stream_identifier=name, start=_EMPTY)
    return _request(_Options(stream=place, no_filter=_EMPTY), backwards, count, subscribe)


def read_all_request(
    start: int, filter: Filter, *, backwards: bool = False, count: int | None = None, subscribe: bool = False
) -> bytes:
    """Forwards from position `start`, inclusive for a read and exclusive for a subscription, -1 for the beginning;
    backwards always from the end."""
    if backwards:
        place = _Options.AllOptions(end=_EMPTY)
    elif start < 0:
        place = _Options.AllOptions(start=_EMPTY)
    else:
        at = min(start, MAX_VERSION)
        place = _Options.AllOptions(position=_Options.Position(commit_position=at, prepare_position=at))
    options = _Options(all=place)
    conditions = _conditions(filter)
    if conditions is None:
        options.no_filter.CopyFrom(_EMPTY)
    else:
        options.filter.CopyFrom(conditions)
    return _request(options, backwards, count, subscribe)


def _request(options: _Options, backwards: bool, count: int | None, subscribe: bool) -> bytes:
    options.read_direction = _Options.Backwards if backwards else _Options.Forwards
    options.uuid_option.CopyFrom(_TEXT)
    if subscribe:
        options.subscription.SetInParent()
    else:
        options.count = MAX_VERSION if count is None else count
    message: bytes = streams_pb2.ReadReq(options=options).SerializeToString()
    return message


def _conditions(filter: Filter) -> _Options.FilterOptions | None:
    """What of the filter the server evaluates: it looks at the stream's name or at the type, not at both."""
    included, excluded = filter.stream_prefixes, filter.exclude_stream_prefixes
    for text in (*filter.types, *included, *excluded):
        check_text(text)
    conditions = _Options.FilterOptions(max=WINDOW, checkpointIntervalMultiplier=1)
    expression = _Options.FilterOptions.Expression
    if included and not excluded:
        conditions.stream_identifier.CopyFrom(expression(prefix=included))
    elif excluded:
        conditions.stream_identifier.CopyFrom(
            expression(regex=f"^(?!{_alternatives(excluded)}){_alternatives(included)}")
        )
    elif filter.types:
        conditions.event_type.CopyFrom(expression(regex=f"^{_alternatives(filter.types)}$"))
    else:
        return None
    return conditions


def _alternatives(texts: Sequence[str]) -> str:
    return f"(?:{'|'.join(re.escape(text) for text in texts)})"


def served(filter: Filter) -> bool:
    """The server evaluates all of the filter, so that what it sends need not be looked at again, and it may count."""
    return not filter.types


def is_no_record(refusal: str) -> bool:
    """Whether a read was refused because no record begins at its position: positions are offsets, not numbers."""
    return "invalidposition" in refusal.replace(" ", "").casefold()


_new: Final = tuple.__new__  # what `RecordedEvent` calls too, by a function that takes as long as this does


def recorded(record: _Record) -> RecordedEvent:
    """An event as the server sends it."""
    facts, position, version = record.metadata, record.commit_position, record.stream_revision
    if position > MAX_VERSION or version > MAX_VERSION:
        raise _impossible(f"an event at position {position}, revision {version}")
    return _new(
        RecordedEvent,
        (
            position,
            record.stream_identifier.stream_name.decode(),
            version,
            facts["type"],
            record.data,
            record.custom_metadata,
            facts["content-type"] == JSON,
            bytes.fromhex(record.id.string.replace("-", "")),
            int(facts["created"] or 0),
        ),
    )


def caught_up_at(caught_up: streams_pb2.ReadResp.CaughtUp) -> int | None:
    """Return the position in the log at which a subscription caught up, as KurrentDB says since 25; None where the
    server does not say it."""
    for field in UnknownFieldSet(caught_up):  # esdbclient's messages are older than the field
        if field.field_number == _POSITION and isinstance(field.data, bytes):
            try:
                return int(_Options.Position.FromString(field.data).commit_position)
            except DecodeError:
                return None
    if "position" in caught_up.DESCRIPTOR.fields_by_name and caught_up.HasField("position"):
        return int(caught_up.position.commit_position)
    return None


# ---- appending -----------------------------------------------------------------------


def append_request(number: int, stream: str, events: Sequence[EventData], expected: Expected, seconds: float) -> bytes:
    """One append of a BatchAppend call; its answer has the same `number`."""
    message = streams_pb2.BatchAppendReq(
        correlation_id=shared_pb2.UUID(structured=shared_pb2.UUID.Structured(least_significant_bits=number)),
        proposed_messages=[
            streams_pb2.BatchAppendReq.ProposedMessage(
                id=shared_pb2.UUID(string=str(event.id)),
                metadata={"type": event.type, "content-type": event.content_type},
                custom_metadata=event.metadata,
                data=event.data,
            )
            for event in events
        ],
        is_final=True,
    )
    options = message.options
    options.stream_identifier.stream_name = stream.encode()
    options.deadline.seconds = max(1, int(seconds))
    if expected is ANY:
        options.any.SetInParent()
    elif expected is NO_STREAM:
        options.no_stream.SetInParent()
    elif expected is STREAM_EXISTS:
        options.stream_exists.SetInParent()
    else:
        options.stream_position = min(expected, MAX_VERSION)
    data: bytes = message.SerializeToString()
    return data


def number_of(answer: Answer) -> int:
    """Which append the answer is about."""
    identity = answer.correlation_id
    return UUID(identity.string).int if identity.string else identity.structured.least_significant_bits


def outcome_of(answer: Answer, stream: str, expected: Expected, size: int) -> Appended | StoreError | Undecided:
    """What became of the append. A deleted stream is said to be tombstoned: for `STREAM_EXISTS` it may not be."""
    try:
        return _outcome(answer, stream, expected, size)
    except StoreUnavailable as error:  # it happened, or not: the numbers of the answer make no sense
        return error


def _outcome(answer: Answer, stream: str, expected: Expected, size: int) -> Appended | StoreError | Undecided:
    if answer.HasField("success"):
        success = answer.success
        version = signed(success.current_revision) if success.HasField("current_revision") else -1
        if version == MAX_VERSION:  # KurrentDB 26.1 lets an empty append to a tombstoned stream succeed
            return StreamDeleted(stream)
        return Appended(version, signed(success.position.commit_position) if success.HasField("position") else -1)
    error = answer.error
    details = error.details
    kind = details.type_url.rpartition(".")[2]
    match kind:
        case "WrongExpectedVersion":
            wrong = shared_pb2.WrongExpectedVersion()
            details.Unpack(wrong)
            actual = signed(wrong.current_stream_revision) if wrong.HasField("current_stream_revision") else -1
            return WrongExpectedVersion(stream, describe(expected), actual)
        case "StreamDeleted":
            return StreamDeleted(stream)
        case "MaximumAppendSizeExceeded":
            limit = shared_pb2.MaximumAppendSizeExceeded()
            details.Unpack(limit)
            return EventTooLarge(stream, size, limit.maxAppendSize, "the server's")
        case "AccessDenied":
            return StreamForbidden(stream, "to append to")
        case "BadRequest":
            bad = shared_pb2.BadRequest()
            details.Unpack(bad)
            return StoreError(f"EventStoreDB refuses the append to stream {stream!r}: {bad.message}")
        case "InvalidTransaction":
            return StoreError(f"EventStoreDB refuses the append to stream {stream!r}: invalid transaction")
        case "Timeout":
            return TimedOut(f"EventStoreDB did not finish an append to stream {stream!r} in time")
    return Undecided(f"{kind or 'no reason'} {error.message}".rstrip())


def refused_deletion(error: Exception, stream: str, expected: Expected) -> StoreError | None:
    """What an error of EventStoreDB's client means for a delete; None when it tells nothing about the stream."""
    # The two clients' names differ in this ending; NotFound is their word for a wrong version of nothing.
    kind = type(error).__name__.removesuffix("Error")
    actual = _ACTUAL.search(str(error))
    if kind == "NotFound":
        return WrongExpectedVersion(stream, describe(expected), -1)
    if kind in ("WrongCurrentVersion", "WrongExpectedVersion") and actual is not None:
        return WrongExpectedVersion(stream, describe(expected), signed(int(actual[1])))
    if kind == "AccessDenied" or "PERMISSION_DENIED" in str(error):
        return StreamForbidden(stream, "to delete")
    return StreamDeleted(stream) if "Deleted" in kind or "Tombstoned" in kind else None


def client_version(expected: Expected) -> int | StreamState:
    """An expected version in the words of EventStoreDB's client."""
    if expected is ANY:
        return StreamState.ANY
    if expected is STREAM_EXISTS:
        return StreamState.EXISTS
    return StreamState.NO_STREAM if expected is NO_STREAM else expected
