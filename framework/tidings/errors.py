"""Every error that crosses a Tidings port: what happened, to what, and what to do about it.

    TidingsError
    ├── StoreError
    │   ├── WrongExpectedVersion
    │   ├── Contention
    │   ├── StreamNotFound
    │   ├── VersionNotFound
    │   ├── StreamDeleted
    │   ├── StreamTruncated
    │   ├── EventTooLarge
    │   ├── InvalidStreamName
    │   ├── InvalidMetadata
    │   ├── InvalidAppend
    │   ├── PartlyRepeated
    │   ├── AbilityMissing
    │   ├── StoreUnavailable
    │   │   └── StreamForbidden
    │   ├── LogChanged
    │   └── LogBehind
    ├── BusError
    │   ├── Unroutable
    │   ├── PublishRejected
    │   ├── QueueRefused
    │   ├── TopologyMismatch
    │   └── BusUnavailable
    ├── DatabaseUnavailable
    │   └── DatabaseMoved
    ├── Fenced
    ├── ConfigurationError
    ├── RepetitionDiffers
    ├── SchemaError
    │   ├── DeployNeeded
    │   │   ├── UnknownEventType
    │   │   ├── UpcastMissing
    │   │   ├── UpcastFailed
    │   │   └── PartitionKeyDiffers
    │   └── MalformedMessage
    └── HandlerError
        ├── HandlerTimeout
        ├── AttemptEnded
        ├── TransactionMisuse
        ├── StatementFailed
        └── WriterHeld

No exception of an adapter's library crosses a port: it is the `__cause__` of one of these.
"""

from __future__ import annotations

from uuid import UUID

__all__ = [
    "AbilityMissing",
    "AttemptEnded",
    "BusError",
    "BusUnavailable",
    "ConfigurationError",
    "Contention",
    "DatabaseMoved",
    "DatabaseUnavailable",
    "DeployNeeded",
    "EventTooLarge",
    "Fenced",
    "HandlerError",
    "HandlerTimeout",
    "InvalidAppend",
    "InvalidMetadata",
    "InvalidStreamName",
    "LogBehind",
    "LogChanged",
    "MalformedMessage",
    "PartitionKeyDiffers",
    "PartlyRepeated",
    "PublishRejected",
    "QueueRefused",
    "RepetitionDiffers",
    "SchemaError",
    "StatementFailed",
    "StoreError",
    "StoreUnavailable",
    "StreamDeleted",
    "StreamForbidden",
    "StreamNotFound",
    "StreamTruncated",
    "TidingsError",
    "TopologyMismatch",
    "TransactionMisuse",
    "UnknownEventType",
    "Unroutable",
    "UpcastFailed",
    "UpcastMissing",
    "VersionNotFound",
    "WriterHeld",
    "WrongExpectedVersion",
]


class TidingsError(Exception):
    """The root: catch it to catch everything that Tidings raises on purpose."""


# ---- the event store ---------------------------------------------------------------


class StoreError(TidingsError):
    """The event store refused or failed an operation."""


class WrongExpectedVersion(StoreError):
    """An append, delete or tombstone expected another stream version than it found; nothing was written.

    `expected` is what the caller asked for, in words; `actual` is the stream's last version, -1 without events.
    """

    def __init__(self, stream: str, expected: str, actual: int) -> None:
        self.stream, self.expected, self.actual = stream, expected, actual
        found = f"its last version is {actual}" if actual >= 0 else "it has no events"
        super().__init__(
            f"stream {stream!r}: expected {expected}, but {found}; nothing was written. "
            "Load the stream again, decide again, and append with the version just read."
        )


class Contention(StoreError):
    """A change gave up after `seconds`, because others kept changing the same aggregate; nothing was written.

    The caller named no version, so it may simply try again later. `lost` counts attempts that lost to other processes.
    """

    def __init__(self, stream: str, seconds: float, lost: int) -> None:
        self.stream, self.seconds, self.lost = stream, seconds, lost
        met = (
            f"{lost} attempts in {seconds:g} s lost to changes by other processes"
            if lost
            else f"it waited {seconds:g} s behind other changes of this process, and was not tried"
        )
        super().__init__(
            f"stream {stream!r} is changed by many at once: {met}; nothing was written. Try again later. If it happens "
            "often, divide the aggregate into several, or let one process change it; within= of the repository gives "
            "each change more time."
        )


class StreamNotFound(StoreError):
    """The stream has no events: it never existed, or was deleted softly."""

    def __init__(self, stream: str) -> None:
        self.stream = stream
        super().__init__(f"stream {stream!r} has no events: it was never written, or it was deleted. Check its name.")


class VersionNotFound(StoreError):
    """An aggregate was requested at a version or moment that its stream does not have."""

    def __init__(self, stream: str, asked: str, found: str) -> None:
        self.stream = stream
        super().__init__(f"stream {stream!r} has no {asked}: {found}")


class StreamDeleted(StoreError):
    """The stream was tombstoned for good, or it was deleted softly and an append expected `STREAM_EXISTS`."""

    def __init__(self, stream: str, *, tombstoned: bool = True) -> None:
        self.stream, self.tombstoned = stream, tombstoned
        remedy = (
            "It was tombstoned: the name can never be used again; write to another stream."
            if tombstoned
            else "It was deleted softly: append with ANY or NO_STREAM to begin it again."
        )
        super().__init__(f"stream {stream!r} is deleted. {remedy}")


class StreamTruncated(StoreError):
    """The first events of an aggregate's stream are hidden, so its state cannot be known.

    `first` is the version with which the stream begins now; -1 if every event is hidden.
    """

    def __init__(self, stream: str, first: int, hidden_by: str) -> None:
        self.stream, self.first = stream, first
        begins = f"begins with version {first}" if first >= 0 else "shows none of its events"
        super().__init__(
            f"stream {stream!r} {begins}: what was before is hidden by its metadata ({hidden_by}), so the state of the "
            "aggregate cannot be known. Streams of aggregates are kept whole: leave $maxCount, $maxAge and $tb out, "
            f"with  await store.set_metadata({stream!r}, {{}}) , and the events are there again, unless a scavenge "
            "removed them."
            + (
                f" If version {first} does begin the aggregate (its event carries the whole state, or the stream was "
                f"deleted and begun again), add  'tidingsBegins': {first}  to the metadata."
                if first >= 0
                else ""
            )
        )


class EventTooLarge(StoreError):
    """An append of `size` bytes is over `whose` (such as "the server's") `limit` of bytes; nothing was written."""

    def __init__(self, stream: str, size: int, limit: int, whose: str = "the", *, others: int = 0) -> None:
        """`others` counts further streams of the same append."""
        self.stream, self.size, self.limit = stream, size, limit
        also = f" and {others} other(s)" if others else ""
        super().__init__(
            f"append to stream {stream!r}{also} is {size} bytes, {whose} limit is {limit}; nothing was written. "
            "Split the append, or keep the large part elsewhere and refer to it."
        )


class InvalidStreamName(StoreError):
    """A stream name or event type that no store accepts, or that is reserved."""


class InvalidMetadata(StoreError):
    """A stream's metadata that no store accepts, because a server could crash on it; nothing was written."""

    def __init__(self, stream: str, reason: str) -> None:
        self.stream, self.reason = stream, reason
        super().__init__(
            f"metadata of stream {stream!r}: {reason}; nothing was written (an EventStoreDB server can crash "
            "on it). Write a smaller number, or leave $maxAge out"
        )


class InvalidAppend(StoreError):
    """An append over several streams that no store accepts, such as one with a stream twice; nothing was written.

    `stream` is the stream at fault, None if it is none of them alone.
    """

    def __init__(self, stream: str | None, reason: str) -> None:
        self.stream = stream
        of = "" if stream is None else f", stream {stream!r}"
        super().__init__(f"append over several streams{of}: {reason}; nothing was written")


class PartlyRepeated(StoreError):
    """An append over several streams has events that are in the log already, and others that are not; nothing was
    written.

    `stream` has its events of the append, up to version `version`; `missing` does not, None if the server does not say
    which one.
    """

    def __init__(self, stream: str, version: int, missing: str | None = None) -> None:
        self.stream, self.version, self.missing = stream, version, missing
        other = "another stream" if missing is None else f"stream {missing!r}"
        super().__init__(
            f"append over several streams: stream {stream!r} has its events already (up to version {version}), but "
            f"{other} does not; nothing was written. Repeat an append as it was, with all of its events. To "
            "append the missing ones alone, leave out the streams that have theirs; to append everything once more, "
            "give the events new ids."
        )


class AbilityMissing(StoreError):
    """The store cannot do what it was asked for; nothing was written. `ability` is its name in `Ability`."""

    def __init__(self, ability: str, where: str, remedy: str) -> None:
        self.ability = ability
        super().__init__(f"{where} does not offer {ability}; nothing was written. {remedy}")


class StoreUnavailable(StoreError):
    """The store cannot be reached, or is locked, full or read-only. Appends in flight may or may not have happened."""

    def __init__(self, message: str, *, waiting_helps: bool = True) -> None:
        super().__init__(message)
        self.waiting_helps = waiting_helps
        """Whether it may pass by itself. A starting process waits if so, and ends if somebody must do something."""


class StreamForbidden(StoreUnavailable):
    """The store denies its user one operation on one stream, `stream`; nothing was written or read."""

    def __init__(self, stream: str, operation: str) -> None:
        self.stream = stream
        super().__init__(
            f"the store denies its user {operation} stream {stream!r}. Give the user of TIDINGS_STORE access to it "
            "($acl in the stream's metadata), or name another user; other streams are not affected",
            waiting_helps=False,
        )


class LogChanged(StoreError):
    """The store holds another log than the one that the database has followed."""

    def __init__(self, owner: str, known: UUID, found: UUID) -> None:
        self.owner, self.known, self.found = owner, known, found
        super().__init__(
            f"{owner} has followed log {known}, but the store now holds log {found}. Positions of one log mean nothing "
            "in another. Point TIDINGS_STORE back at the right store. If this log was restored from a backup of the "
            "other one, and has a new identity: 'tidings log adopt' lets the service's database follow it. If the log "
            "was replaced on purpose, give the service a new database."
        )


class LogBehind(StoreError):
    """The log ends below a position that was handled already: a backup was restored in place, or a file was lost."""

    def __init__(self, owner: str, log: UUID, head: int, known: int) -> None:
        self.owner, self.log, self.head, self.known = owner, log, head, known
        super().__init__(
            f"{owner} has handled log {log} up to position {known}, but the log now ends at {head}: it was restored "
            "from an older backup, or lost its tail. Restore the newer log. If there is none: stop the relay and all "
            "services, run 'tidings log renew-identity', then 'tidings log adopt' for each service (docs/restoring.md)."
        )


# ---- the bus -----------------------------------------------------------------------


class BusError(TidingsError):
    """The event bus refused or failed an operation."""


class Unroutable(BusError):
    """No queue is bound to the exchange, so no service would have received the message."""

    def __init__(self, exchange: str, message_id: str) -> None:
        self.exchange, self.message_id = exchange, message_id
        super().__init__(
            f"message {message_id} reached no queue of exchange {exchange!r}: no service is bound to it. "
            "Start a service; its queue is bound when it starts."
        )


class PublishRejected(BusError):
    """The broker refuses this message: it is too large, or cannot be written as AMQP. Do not send it again."""

    def __init__(self, message_id: str, reason: str) -> None:
        self.message_id, self.reason = message_id, reason
        super().__init__(f"the broker refused message {message_id}: {reason}")


class QueueRefused(BusError):
    """A queue cannot take messages now. Every other queue was given this one: do not send it again."""


class TopologyMismatch(BusError):
    """A queue or exchange exists with other properties than Tidings needs."""


class BusUnavailable(BusError):
    """The broker cannot be reached, or the connection, channel or queue was lost. The outcome of sends is unknown."""


# ---- a service ---------------------------------------------------------------------


class DatabaseUnavailable(TidingsError):
    """The service's own database is locked, full, read-only or down. Does not count as an attempt of a handler."""

    def __init__(self, message: str, *, waiting_helps: bool = True) -> None:
        super().__init__(message)
        self.waiting_helps = waiting_helps
        """As for `StoreUnavailable`."""


class DatabaseMoved(DatabaseUnavailable):
    """The file of a service's SQLite database was moved, deleted or replaced while the service had it open.

    The service ends: what it would write from now on is in no file of that name.
    """

    def __init__(self, path: str, *, replaced: bool) -> None:
        self.path = path
        what = "another file was put in its place" if replaced else "it was moved or deleted"
        super().__init__(
            f"the database file {path} is not the one that was opened: {what} while the service had it open, so the "
            "service has stopped. Nothing is lost: the log has every event. Put the file back, with its -wal and -shm, "
            "and start the service again; it goes on where it was. If the file is gone for good, restore a backup "
            "first (tidings restore). Without either, the service begins with an empty database and handles the whole "
            "log again, with its effects outside the database.",
            waiting_helps=False,
        )


class Fenced(TidingsError):
    """Another process moved a watermark of this service: the transaction here was rolled back, and this process
    rejoins."""


class ConfigurationError(TidingsError):
    """A setting, URL, name or declaration that cannot work. Raised as early as possible."""


class RepetitionDiffers(TidingsError):
    """A transaction has the idempotency key of an earlier one but an event with other data; nothing was committed."""

    def __init__(self, key: str, stream: str, type: str, event_id: str, fields: list[str]) -> None:
        self.key = key
        self.stream = stream
        self.type = type
        self.fields = fields
        """Names of the fields that differ."""
        where = f" in {', '.join(fields)}" if fields else ""
        super().__init__(
            f"idempotency key {key!r}: the request that came first with this key emitted {type} {event_id} to stream "
            f"{stream!r} with other data; this one differs{where}. Nothing was committed. Another request needs "
            "another key. If it is the same request, give its event the same values each time: take times and ids "
            "from the request, not from the clock or at random"
        )


class SchemaError(TidingsError):
    """An event's bytes do not fit the type that was requested, or its value would not read back equal."""


class DeployNeeded(SchemaError):
    """An event that this service's code cannot read but another deploy can. It is held until then, never dead."""


class UnknownEventType(DeployNeeded):
    """The wire name is not declared, or the event's schema version is newer and does not fit."""


class UpcastMissing(DeployNeeded):
    """The event's schema version is older than the oldest one that its class reads."""


class UpcastFailed(DeployNeeded):
    """An upcaster raised, or did not return a JSON object."""


class PartitionKeyDiffers(DeployNeeded):
    """The consumer's view declares another `key=` than the one with which the event was written."""


class MalformedMessage(SchemaError):
    """A message that Tidings did not write, or that was damaged; `reason` says what is wrong."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class HandlerError(TidingsError):
    """A handler failed through its own fault."""


class HandlerTimeout(HandlerError):
    """A handler ran longer than its `timeout`, in seconds; its effects were rolled back."""

    def __init__(self, handler: str, seconds: float) -> None:
        self.handler, self.seconds = handler, seconds
        super().__init__(
            f"handler {handler!r} did not finish within {seconds:g} s. If the work really takes longer, raise "
            "timeout= in its decorator; if it waits for something outside, give that wait a limit of its own."
        )


class AttemptEnded(HandlerError):
    """The context, session or connection of an attempt was used after the attempt had ended."""

    def __init__(self, used: str, handler: str, position: int, event_id: UUID, how: str) -> None:
        self.used, self.handler, self.position, self.event_id = used, handler, position, event_id
        super().__init__(
            f"{used} was used after its handler had ended, and does nothing any more: handler {handler!r} {how} at the "
            f"event at position {position} (id {event_id}). Context, session and connection live as long as one "
            "attempt: await whatever the handler starts before it returns (asyncio.TaskGroup), keep none of the three "
            "for later, and give longer work an event and a handler of its own."
        )


class TransactionMisuse(HandlerError):
    """A handler or a request called commit, rollback or begin on its session. Tidings ends the transaction itself."""

    def __init__(self, operation: str) -> None:
        self.operation = operation
        super().__init__(
            f"{operation}() must not be called on this session: Tidings commits the effects together with the "
            "watermark or the staged events, when the handler has returned or the block has ended. Use "
            "session.begin_nested() for a part that may fail; raise to undo everything."
        )


class StatementFailed(HandlerError):
    """A handler went on after one of its statements had failed; PostgreSQL undoes everything around it."""

    def __init__(self) -> None:
        super().__init__(
            "a statement failed, and the handler went on. SQLite undoes only that statement; PostgreSQL undoes "
            "everything that the handler did, and accepts no further statement. Raise, or put the part that may "
            "fail into: async with session.begin_nested()"
        )


class WriterHeld(HandlerError):
    """A handler with a session wrote to the same SQLite database through another connection, and blocked itself."""

    def __init__(self, handler: str) -> None:
        self.handler = handler
        super().__init__(
            f"handler {handler!r} wrote to its service's database through a connection of its own while the injected "
            "session holds the one writer that SQLite has. Write through the session."
        )
