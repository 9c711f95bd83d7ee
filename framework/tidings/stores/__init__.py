"""The event store's port: streams of events in one global order. It moves bytes; typing happens at the edges.

Rules that every adapter keeps, each proved by a test of `tidings.testing.store_conformance`:

* An append is atomic: all of its events or none, with consecutive stream versions and increasing global positions.
* What `append` returned survives the death of the process and of the machine.
* Expected versions and idempotency by event id are EventStoreDB's, exactly (see `Expected`).
* A global position is used once and is greater than 0. Readers see positions only in rising order.
* Every position that a store returns is at most 2^63 - 1 and in the log: no checkpoint is above `head`. The position
  before everything, also in an empty log, is -1.
* Appends to one stream that a task starts one after the other, without waiting, are applied in that order.
* A catch-up subscription has no gap and no repetition where history meets live events.
* An append over several streams (`append_several`) is judged stream by stream as `append` judges each, and then written
  whole or not at all. No event of another append stands between its events. A store that cannot do this raises
  `AbilityMissing`; `EventStore.abilities` says so beforehand.
* Truncation, soft delete and tombstone hide events of a stream, never of `$all`.
* Every store refuses, before anything is sent, what would crash an EventStoreDB 24.2 server: any use of a stream `$$`,
  `$maxAge` over 60,000,000,000 s, metadata for a tombstoned stream, deletion of a metadata stream.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Any, Final, Generic, NamedTuple, Protocol, TypeVar, runtime_checkable
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
    "Ability",
    "Appended",
    "AppendedSeveral",
    "CaughtUp",
    "Checkpoint",
    "EventData",
    "EventStore",
    "Expected",
    "Filter",
    "RecordedEvent",
    "StreamAppend",
    "StreamMetadata",
    "StreamState",
    "check_stream_name",
    "check_text",
    "describe",
]

E = TypeVar("E")

JSON: Final = "application/json"
OCTETS: Final = "application/octet-stream"

MAX_POSITION: Final = 2**63 - 1
"""The highest possible position or version."""

APPEND_LIMIT: Final = 1024 * 1024
"""Bytes of one append, at most, by `EventData.size`: EventStoreDB's default."""

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class StreamState(Enum):
    """Expected states of a stream that are not versions."""

    ANY = "any version"
    NO_STREAM = "no stream"
    STREAM_EXISTS = "an existing stream"


ANY: Final = StreamState.ANY
NO_STREAM: Final = StreamState.NO_STREAM
STREAM_EXISTS: Final = StreamState.STREAM_EXISTS

Expected = int | StreamState
"""A stream version (0-based: the version of the stream's last event) or a `StreamState`.

`NO_STREAM` and explicit versions stay idempotent: appending the same events again returns the same and writes nothing.
`ANY` and `STREAM_EXISTS` may write again after a restart of the store (measured on EventStoreDB 24.2): never repeat
them blindly.
"""


class Ability(Enum):
    """What some stores can do, and others cannot. Its value is its name in errors and in docs/adapters.md."""

    APPEND_SEVERAL = "append_several"
    """An append over several streams, all or nothing."""
    CONSECUTIVE_POSITIONS = "consecutive positions"
    """The positions of an append's events follow one another without a gap: n, n + 1, n + 2. In an append over several
    streams, the metadata with which a softly deleted stream begins again may stand between two streams' events."""


def describe(expected: Expected) -> str:
    """Return an expected version in words, for errors."""
    return f"version {expected}" if isinstance(expected, int) else expected.value


@dataclass(frozen=True, slots=True)
class EventData:
    """An event to append. Any `content_type` other than JSON is stored and read back as octets."""

    type: str
    data: bytes
    metadata: bytes = b""
    content_type: str = JSON
    id: UUID = field(default_factory=uuid4)

    @property
    def size(self) -> int:
        """Bytes that count towards the limit of an append, by EventStoreDB's formula."""
        return len(self.data) + len(self.metadata) + 2 * len(self.type)


class RecordedEvent(NamedTuple):
    """An event as the log holds it. A tuple, for fast reading; `id` and `recorded_at` are computed when they are
    used."""

    position: int
    """Global position: greater than 0, never used twice."""
    stream: str
    version: int
    """Place in the stream, from 0."""
    type: str
    data: bytes
    metadata: bytes
    is_json: bool
    id_bytes: bytes
    """The event id's 16 bytes, big-endian."""
    ticks: int
    """Time of recording in units of 100 ns since 1970, UTC (EventStoreDB's unit)."""

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
    """The result of an append: version and position of its last event (version -1 if the stream has no events).

    A repeated append returns the result of the first one. An empty append returns the stream's version.
    """

    version: int
    position: int


class StreamAppend(NamedTuple, Generic[E]):
    """What an append over several streams does to one of them.

    Without events, it only demands that the stream is as `expected`; `ANY` then demands nothing.
    """

    stream: str
    events: Sequence[E] = ()
    expected: Expected = ANY


class AppendedSeveral(NamedTuple):
    """The result of an append over several streams. A repeated one returns the result of the first one."""

    versions: Mapping[str, int]
    """For each stream that got events, the version of the last of them."""
    position: int
    """The position of the append's last event."""


class Checkpoint(NamedTuple):
    """A subscription has read everything up to `position`, whether it matched or not. Never above the log's head."""

    position: int


class CaughtUp(NamedTuple):
    """A subscription has reached the end of the log and continues live. May come again after it has fallen behind.

    `position` is the last position that was read, or -1. It may be below the log's head if no event in between matches
    the filter.
    """

    position: int


@dataclass(frozen=True, slots=True)
class Filter:
    """Conditions for events of `$all`. All of them must hold; without any, every event passes.

    One of several prefixes is enough. A store evaluates the filter where the data is.
    """

    types: tuple[str, ...] = ()
    """Complete wire names to include; empty for all."""
    stream_prefixes: tuple[str, ...] = ()
    """Prefixes of streams to include; empty for all."""
    exclude_stream_prefixes: tuple[str, ...] = ()
    """Prefixes of streams to leave out."""

    def matches(self, event: RecordedEvent) -> bool:
        return (
            (not self.types or event.type in self.types)
            and (not self.stream_prefixes or event.stream.startswith(self.stream_prefixes))
            and not event.stream.startswith(self.exclude_stream_prefixes)
        )


EVERYTHING: Final = Filter()


class StreamMetadata(NamedTuple):
    """A stream's metadata and the version of its metadata stream (-1 if none was ever set).

    The store obeys the keys `$maxCount` (events), `$maxAge` (seconds) and `$tb` (truncate before this version).
    """

    values: Mapping[str, Any]
    version: int


def check_stream_name(stream: str) -> None:
    """Raise `InvalidStreamName` for a name that EventStoreDB refuses or crashes on: empty, or `$$` without a name."""
    if not stream or (stream[:2] == "$$" and len(stream) % 2 == 0 and not stream.strip("$")):
        raise InvalidStreamName(f"{stream!r} is not a stream name: give at least one character (also after '$$')")


def check_text(text: str) -> None:
    """Raise `InvalidStreamName` for a stream or type that UTF-8 cannot express."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidStreamName(f"{text!r} has characters that UTF-8 cannot express (lone surrogates)") from error


@runtime_checkable
class EventStore(Protocol):
    """A log of events in streams. Open one with `async with tidings.open_store(url) as store`."""

    async def append(self, stream: str, events: Sequence[EventData], *, expected: Expected = ANY) -> Appended:
        """Append all events or none, durably.

        Raises `WrongExpectedVersion`, `StreamDeleted`, `EventTooLarge`, `InvalidStreamName`, and for a metadata stream
        (`$$...`) `InvalidMetadata`. After `StoreUnavailable` the outcome is unknown. A cancelled append may still
        happen.

        Use an event's id in one stream only. EventStoreDB remembers only the first stream of an id: in a second stream,
        an event that is repeated with `ANY` is written again (measured on 24.2).
        """
        ...

    async def append_several(self, appends: Sequence[StreamAppend[EventData]]) -> AppendedSeveral:
        """Append events to several streams, all or nothing, durably. The log gets the events in the order given.

        Each stream is judged as `append` judges it, so a repetition of the whole append is known by the events' ids,
        and returns what the first one returned, whatever the streams without events are like by then. If only some of
        the streams have their events already, `PartlyRepeated` is raised.

        At most 1,000 streams, each of them once, and at least one event; events' sizes count together towards the limit
        of an append. Raises what `append` raises, always naming a stream, and `InvalidAppend` and `AbilityMissing`.
        After `StoreUnavailable` the outcome is unknown. Repeat it with the same ids if one of the streams with events
        has a version or `NO_STREAM` as its expectation (see `Expected`). It has no order among appends that are under
        way at the same time.
        """
        ...

    async def abilities(self) -> frozenset[Ability]:
        """Return what the store can do beyond the rules. A store in front of a server asks it, and raises
        `StoreUnavailable` if it does not answer."""
        ...

    def read_stream(
        self, stream: str, *, start: int | None = None, backwards: bool = False, limit: int | None = None
    ) -> AsyncIterator[RecordedEvent]:
        """Yield the stream's readable events from version `start` inclusive, by default from its beginning (or end).

        Raises `StreamNotFound` and `StreamDeleted` at the first step.
        """
        ...

    def read_all(
        self, *, after: int = -1, backwards: bool = False, limit: int | None = None, filter: Filter = EVERYTHING
    ) -> AsyncIterator[RecordedEvent]:
        """Yield events of the whole log above position `after` in order; backwards, from the end of the log down to it.

        No event need be at `after`. If none is, EventStoreDB's server cannot begin there, and the reader first looks
        from the end of the log for the event below it.
        Ends at the end of the log as it is when the reader gets there. `limit` counts matching events.
        """
        ...

    def subscribe_all(
        self, *, after: int = -1, filter: Filter = EVERYTHING
    ) -> AsyncIterator[RecordedEvent | Checkpoint | CaughtUp]:
        """Follow the log from position `after` without end. `Checkpoint` reports progress where no event matches."""
        ...

    def subscribe_stream(self, stream: str, *, after_version: int = -1) -> AsyncIterator[RecordedEvent | CaughtUp]:
        """Follow one stream without end. Waits for a missing or softly deleted one; a tombstoned one raises."""
        ...

    async def head(self) -> int:
        """Return the position of the last event in the log, -1 for an empty one.

        A reading that begins after the answer finds everything up to it. Services rely on this: they take what they do
        not find for removed. So a store of several replicas answers both from the same one, or from its leader.
        """
        ...

    async def log_id(self) -> UUID:
        """Return the log's identity, which is created with the log as the first event of the stream `tidings_log`."""
        ...

    async def get_metadata(self, stream: str) -> StreamMetadata:
        """Return the stream's metadata; empty with version -1 if none was set. Raises `StreamDeleted` if tombstoned."""
        ...

    async def set_metadata(self, stream: str, values: Mapping[str, Any], *, expected: Expected = ANY) -> Appended:
        """Replace the stream's metadata. `expected` is the version of the metadata stream.

        Raises what `append` raises, and `StreamDeleted` for a tombstoned stream.
        """
        ...

    async def delete(self, stream: str, *, expected: Expected = ANY) -> None:
        """Hide the stream's events; a later append begins after them.

        Raises `WrongExpectedVersion` for a missing stream, `InvalidStreamName` for a metadata stream.
        """
        ...

    async def tombstone(self, stream: str, *, expected: Expected = ANY) -> None:
        """Close the stream for good: every later use raises `StreamDeleted`. Raises `InvalidStreamName` as `delete`."""
        ...

    async def close(self) -> None:
        """End subscriptions and release files and connections. Harmless when repeated."""
        ...
