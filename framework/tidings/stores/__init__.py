"""The event store's port: streams of events in one global order. It moves bytes; typing happens at the edges.

Rules that every adapter keeps, each proved by a test of `tidings.testing.store_conformance`:

* An append is atomic: all of its events or none, with consecutive stream versions and increasing global positions.
* What `append` returned survives the death of the process and of the machine.
* Expected versions and idempotency by event id are EventStoreDB's, exactly (see `Expected`).
* A global position is used once, is greater than 0, and is never seen before a lower one.
* A position that a store tells is at most 2^63 - 1 and in the log: no checkpoint is above `head`. Before everything,
  also of an empty log, it is -1.
* Appends that one task starts one after the other, without waiting, to one stream are applied in that order.
* A catch-up subscription has no gap and no repetition where history meets live events.
* Truncation, soft delete and tombstone hide events of a stream, never of `$all`.
* What would end the process of an EventStoreDB 24.2 server is refused before anything is sent, by every store: any use
  of a stream `$$`, `$maxAge` over 60,000,000,000 s, metadata for a tombstoned stream, deletion of a metadata stream.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Any, Final, NamedTuple, Protocol, runtime_checkable
from uuid import UUID, uuid4

from tidings.errors import InvalidStreamName

__all__ = [
    "ANY",
    "APPEND_LIMIT",
    "EVERYTHING",
    "JSON",
    "MAX_POSITION",
    "NO_STREAM",
    "OCTETS",
    "STREAM_EXISTS",
    "Appended",
    "CaughtUp",
    "Checkpoint",
    "EventData",
    "EventStore",
    "Expected",
    "Filter",
    "RecordedEvent",
    "StreamMetadata",
    "StreamState",
    "check_stream_name",
    "check_text",
    "describe",
]

JSON: Final = "application/json"
OCTETS: Final = "application/octet-stream"

MAX_POSITION: Final = 2**63 - 1
"""The highest number that a position or version can be."""

APPEND_LIMIT: Final = 1024 * 1024
"""Bytes of one append, by `EventData.size`; EventStoreDB's default."""

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class StreamState(Enum):
    """Expected states of a stream that are no version."""

    ANY = "any version"
    NO_STREAM = "no stream"
    STREAM_EXISTS = "an existing stream"


ANY: Final = StreamState.ANY
NO_STREAM: Final = StreamState.NO_STREAM
STREAM_EXISTS: Final = StreamState.STREAM_EXISTS

Expected = int | StreamState
"""A stream version (0-based: the version of the stream's last event) or a `StreamState`.

`NO_STREAM` and explicit versions are idempotent for ever: the same events again answer as before and write nothing.
`ANY` and `STREAM_EXISTS` may write again after the store was restarted (measured on EventStoreDB 24.2): never repeat
them blindly.
"""


def describe(expected: Expected) -> str:
    """An expected version in words, for errors."""
    return f"version {expected}" if isinstance(expected, int) else expected.value


@dataclass(frozen=True, slots=True)
class EventData:
    """An event to append. `content_type` other than JSON is stored, and read back, as octets."""

    type: str
    data: bytes
    metadata: bytes = b""
    content_type: str = JSON
    id: UUID = field(default_factory=uuid4)

    @property
    def size(self) -> int:
        """Bytes that count towards the append limit; EventStoreDB's formula."""
        return len(self.data) + len(self.metadata) + 2 * len(self.type)


class RecordedEvent(NamedTuple):
    """An event as the log holds it. A tuple, because reading is hot; `id` and `recorded_at` are made when asked for."""

    position: int
    """Global position: greater than 0, never used twice."""
    stream: str
    version: int
    """0-based within the stream."""
    type: str
    data: bytes
    metadata: bytes
    is_json: bool
    id_bytes: bytes
    """The event id's 16 bytes, big-endian."""
    ticks: int
    """When the store recorded it: units of 100 ns since 1970 (EventStoreDB's unit), UTC."""

    @property
    def id(self) -> UUID:
        return UUID(bytes=self.id_bytes)

    @property
    def recorded_at(self) -> datetime:
        return EPOCH + timedelta(microseconds=self.ticks // 10)

    @property
    def content_type(self) -> str:
        return JSON if self.is_json else OCTETS


class Appended(NamedTuple):
    """What an append did: the version of its last event (-1: the stream has none) and that event's position.

    After an idempotent repetition they are those of the first time. An empty append answers with the stream's version.
    """

    version: int
    position: int


class Checkpoint(NamedTuple):
    """Everything up to `position` was looked at, whether it matched the filter or not. Never above the log's head."""

    position: int


class CaughtUp(NamedTuple):
    """The subscription reached the end of the log; what follows is live. It may come again after falling behind.

    `position` is the last position that was looked at; -1 when nothing was. It may lag behind the log's head, where no
    event of the filter is.
    """

    position: int


@dataclass(frozen=True, slots=True)
class Filter:
    """Which events of `$all` to deliver. All given conditions must hold; without any, everything passes.

    Prefixes are alternatives of each other. A store evaluates the filter where the data is.
    """

    types: tuple[str, ...] = ()
    """Wire names to include, whole; empty: all."""
    stream_prefixes: tuple[str, ...] = ()
    """Include streams that begin with one of these; empty: all."""
    exclude_stream_prefixes: tuple[str, ...] = ()
    """Leave out streams that begin with one of these."""

    def matches(self, event: RecordedEvent) -> bool:
        return (
            (not self.types or event.type in self.types)
            and (not self.stream_prefixes or event.stream.startswith(self.stream_prefixes))
            and not event.stream.startswith(self.exclude_stream_prefixes)
        )


EVERYTHING: Final = Filter()


class StreamMetadata(NamedTuple):
    """A stream's metadata document and the version of its metadata stream (-1: none was ever set).

    Keys that the store obeys: `$maxCount` (events), `$maxAge` (seconds), `$tb` (truncate before this version).
    """

    values: Mapping[str, Any]
    version: int


def check_stream_name(stream: str) -> None:
    """Raise `InvalidStreamName` for a name that EventStoreDB refuses, or ends over: empty, or `$$` of nothing."""
    if not stream or (stream[:2] == "$$" and len(stream) % 2 == 0 and not stream.strip("$")):
        raise InvalidStreamName(f"{stream!r} is not a stream name: give at least one character (behind '$$', too)")


def check_text(text: str) -> None:
    """Raise `InvalidStreamName` for a stream or type that UTF-8 cannot express."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidStreamName(f"{text!r} has characters that UTF-8 cannot express (lone surrogates)") from error


@runtime_checkable
class EventStore(Protocol):
    """A log of events in streams. Obtain one with `async with tidings.settings.open_store(url) as store`."""

    async def append(self, stream: str, events: Sequence[EventData], *, expected: Expected = ANY) -> Appended:
        """Append all events or none, durably.

        Raises `WrongExpectedVersion`, `StreamDeleted`, `EventTooLarge`, `InvalidStreamName`, and for a metadata stream
        (`$$...`) `InvalidMetadata`; `StoreUnavailable` leaves the outcome unknown. An append that its caller cancels
        while it waits may still happen.

        Give an id to one event of one stream. EventStoreDB remembers of an id the first stream only, whatever stream it
        comes in later: repeated with `ANY` in a second one, the event is written again (measured on 24.2).
        """
        ...

    def read_stream(
        self, stream: str, *, start: int | None = None, backwards: bool = False, limit: int | None = None
    ) -> AsyncIterator[RecordedEvent]:
        """The stream's readable events from version `start` inclusive, by default from its beginning (or its end).

        Raises `StreamNotFound` and `StreamDeleted` at the first step.
        """
        ...

    def read_all(
        self, *, after: int = -1, backwards: bool = False, limit: int | None = None, filter: Filter = EVERYTHING
    ) -> AsyncIterator[RecordedEvent]:
        """Events of the whole log in position order: positions above `after`; backwards, the log's end downwards to it.

        Ends at the end of the log as it was when the reading came there. `limit` counts matching events.
        """
        ...

    def subscribe_all(
        self, *, after: int = -1, filter: Filter = EVERYTHING
    ) -> AsyncIterator[RecordedEvent | Checkpoint | CaughtUp]:
        """Read on from `after` for ever. `Checkpoint` moves across stretches that do not match the filter."""
        ...

    def subscribe_stream(self, stream: str, *, after_version: int = -1) -> AsyncIterator[RecordedEvent | CaughtUp]:
        """Follow one stream for ever; a missing or softly deleted one is waited for, a tombstoned one raises."""
        ...

    async def head(self) -> int:
        """Position of the last event in the log, -1 for an empty one."""
        ...

    async def log_id(self) -> UUID:
        """Identity of the log: made with it, stored as the first event of stream `tidings_log`."""
        ...

    async def get_metadata(self, stream: str) -> StreamMetadata:
        """The stream's metadata; empty with version -1 where none was set. Raises `StreamDeleted` when tombstoned."""
        ...

    async def set_metadata(self, stream: str, values: Mapping[str, Any], *, expected: Expected = ANY) -> Appended:
        """Replace the stream's metadata document; `expected` is about the metadata stream's own version.

        Raises what `append` does; `StreamDeleted` for a tombstoned stream.
        """
        ...

    async def delete(self, stream: str, *, expected: Expected = ANY) -> None:
        """Hide the stream's events; a later append begins after them. `WrongExpectedVersion` for a missing stream,
        `InvalidStreamName` for a metadata stream."""
        ...

    async def tombstone(self, stream: str, *, expected: Expected = ANY) -> None:
        """Close the stream for ever: every later use raises `StreamDeleted`. `InvalidStreamName` as for `delete`."""
        ...

    async def close(self) -> None:
        """End subscriptions and release files and connections; harmless when repeated."""
        ...
