"""Aggregates loaded from their streams and changed with optimistic concurrency. The stream is the only state."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable, Mapping
from copy import copy
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Concatenate, Final, Generic, TypeVar
from uuid import UUID, uuid4, uuid5

import structlog

from tidings.errors import (
    ConfigurationError,
    StreamTruncated,
    UnknownEventType,
    VersionNotFound,
    WrongExpectedVersion,
)
from tidings.modelling.aggregate import Aggregate, apply, begin, declared, state_of, stream_of, stream_version
from tidings.modelling.codec import CAUSATION, CORRELATION, Cause, decode, encode, read_metadata
from tidings.modelling.contention import CHANGE_SECONDS, Turns
from tidings.modelling.events import Event, Registry
from tidings.protocol.identity import instead_of
from tidings.stores import NO_STREAM, EventStore, Expected, RecordedEvent

__all__ = ["Changed", "HistoryEntry", "Repository"]

log = structlog.get_logger("tidings.repository")

A = TypeVar("A", bound=Aggregate)

BEGINS: Final = "tidingsBegins"
"""Metadata key of a stream: the version with which its aggregate begins, if that is not 0."""
CREATION: Final = 8
"""UUID version of the id of the first event that `create` appends."""
HIDING: Final = ("$maxCount", "$maxAge", "$tb")
"""Metadata keys of a stream that hide events."""


@dataclass(frozen=True, slots=True)
class Changed(Generic[A]):
    """The outcome of `create` or `change`."""

    aggregate: A
    version: int
    """The stream's version now."""
    position: int
    """Global position of the last event that was appended; -1 if there was none."""
    events: tuple[Event, ...]
    """The appended events; empty if nothing was recorded, or an earlier attempt had appended them."""
    result: Any = None
    """The result of the decision; None if it was skipped because a handler's earlier attempt had made it."""


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """One event of a stream with who, when and why."""

    version: int
    position: int
    event: Event
    recorded_at: datetime
    metadata: Mapping[str, Any]

    @property
    def correlation_id(self) -> str | None:
        return self.metadata.get(CORRELATION)

    @property
    def causation_id(self) -> str | None:
        return self.metadata.get(CAUSATION)


class Repository(Generic[A]):
    """Aggregates of one kind. Get one from `service.repository(Order)`; it works while the service runs.

    A decision is a method of the aggregate. It is called with the loaded aggregate and the further arguments, and the
    events that it records are appended together. If it raises, the exception passes through and nothing is appended.

    `within` is the number of seconds that a change without `expected` may take. Changes of one aggregate wait for each
    other within a process, and are decided again if another process was faster.
    """

    def __init__(
        self,
        aggregate: type[A],
        store: Callable[[], EventStore],
        *,
        within: float = CHANGE_SECONDS,
        taken: Callable[[UUID, str, str, int], None] | None = None,
    ) -> None:
        """`taken` is told of an event of somebody else under an id that only a handler should use, as `TakenIds.note`
        is."""
        self._aggregate = aggregate
        self._store = store
        self._taken = taken
        self._turns = Turns(within)
        self._reader = f"aggregate {aggregate.__qualname__}"
        self._types = Registry(self._reader)
        for event in declared(aggregate).evolutions:
            self._types.add(event)

    @property
    def aggregate(self) -> type[A]:
        """The class of the aggregates."""
        return self._aggregate

    def on(self, store: EventStore) -> Repository[A]:
        """Return a repository of the same aggregates in another store."""
        other = copy(self)
        other._store = lambda: store
        return other

    def stream_of(self, id: str) -> str:
        """Return the name of the aggregate's stream."""
        return stream_of(self._aggregate, id)

    async def create(
        self,
        id: str,
        decide: Callable[[A], Any] | Callable[Concatenate[A, ...], Any],
        *args: Any,
        metadata: Mapping[str, Any] | None = None,
        correlation_id: str | None = None,
        **kwargs: Any,
    ) -> Changed[A]:
        """Create an aggregate with a decision.

        Raises `WrongExpectedVersion` if its stream has events, and `ConfigurationError` if nothing was recorded.
        """
        aggregate: A = begin(self._aggregate, id)
        result = _decided(decide, aggregate, args, kwargs)
        if not state_of(aggregate).recorded:
            raise ConfigurationError(f"{_named(decide)} recorded nothing, so {id!r} was not created")
        return await self._append(aggregate, result, NO_STREAM, uuid4(), metadata, None, correlation_id)

    async def change(
        self,
        id: str,
        decide: Callable[[A], Any] | Callable[Concatenate[A, ...], Any],
        *args: Any,
        expected: int | None = None,
        metadata: Mapping[str, Any] | None = None,
        correlation_id: str | None = None,
        **kwargs: Any,
    ) -> Changed[A]:
        """Change an existing aggregate with a decision.

        With `expected`, raises `WrongExpectedVersion` unless the stream has that version. Without it, the decision runs
        again on the new state if another change was faster, and `Contention` is raised when that takes too long (see
        `within`). Raises `StreamNotFound`, and `StreamTruncated` if the aggregate's first events are hidden.
        """

        async def attempt() -> Changed[A]:
            aggregate = await self.load(id)
            version = stream_version(aggregate)
            if expected is not None and version != expected:
                raise WrongExpectedVersion(self.stream_of(id), f"version {expected}", version)
            result = _decided(decide, aggregate, args, kwargs)
            return await self._append(aggregate, result, version, uuid4(), metadata, None, correlation_id)

        if expected is not None:
            return await attempt()
        return await self._turns.until_won(self.stream_of(id), attempt)

    async def change_for(
        self,
        cause: Cause,
        since: int,
        base: UUID | tuple[UUID, ...],
        id: str,
        decide: Callable[[A], Any] | Callable[Concatenate[A, ...], Any],
        *args: Any,
        metadata: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Changed[A]:
        """Do the work of `Context.change`: like `change`, but skipped if the stream has its events after position
        `since`.

        The first `base` gives the ids of new events; events with ids from the other ones count, too. An event with such
        an id that this service has not emitted for this cause does not count.
        """
        first, *others = base if isinstance(base, tuple) else (base,)
        spare = instead_of(first)
        known = {_nth(one, 0).bytes for one in (first, *others, spare)}
        # An append is written whole, so the first id of each says whether it is there. The further ones may be taken.
        later = set[bytes]()

        async def attempt() -> Changed[A]:
            aggregate: A = begin(self._aggregate, id)
            done, begins = -1, first
            later.clear()
            async for event in self._store().read_stream(self.stream_of(id)):
                await self._apply(aggregate, event)
                if event.position <= since:
                    continue
                later.add(event.id_bytes)
                if event.id_bytes in known:
                    if _is_of(cause, event):
                        done = event.position
                    else:
                        begins = spare
                        self._name_foreign(event, cause)
            if stream_version(aggregate) < 0:
                await self._check_begins(id, -1)
            if done >= 0:
                return Changed(aggregate, stream_version(aggregate), done, ())
            result = _decided(decide, aggregate, args, kwargs)
            further = range(1, len(state_of(aggregate).recorded))
            rest = later.intersection(_nth(one, n).bytes for n in further for one in (first, spare))
            if rest:
                begins = spare
                async for event in self._store().read_stream(self.stream_of(id)):
                    if event.position > since and event.id_bytes in rest:
                        self._name_foreign(event, cause)
            return await self._append(aggregate, result, stream_version(aggregate), begins, metadata, cause, None)

        return await self._turns.until_won(self.stream_of(id), attempt)

    def _name_foreign(self, event: RecordedEvent, cause: Cause) -> None:
        if self._taken is not None:
            self._taken(event.id, event.stream, event.type, event.position)
        log.error(
            "change.foreign",
            stream=event.stream,
            version=event.version,
            position=event.position,
            event_id=str(event.id),
            type=event.type,
            handler=cause.handler,
            advice="somebody else has appended this event under an id that only this service should use; the handler's "
            "own events are appended beside it. See who may write to the stream, and set TIDINGS_ID_KEYS "
            "(docs/trust.md)",
        )

    async def load(self, id: str, *, at_version: int | None = None, as_of: datetime | None = None) -> A:
        """Load the aggregate: now, at a version (that event included), or as of a moment (up to the first later event).

        Raises `StreamNotFound`, `VersionNotFound` if the stream does not have that version or moment, and
        `StreamTruncated` if the first events are hidden.
        """
        if as_of is not None and as_of.tzinfo is None:
            raise ConfigurationError("as_of needs a time zone: datetime.now(UTC), not datetime.now()")
        stream = stream_of(self._aggregate, id)
        aggregate: A = begin(self._aggregate, id)
        limit = None if at_version is None else at_version + 1
        if limit is not None and limit < 1:
            raise VersionNotFound(stream, f"version {at_version}", "versions count from 0")
        async for event in self._store().read_stream(stream, limit=limit):
            if at_version is not None and event.version > at_version:
                break  # a stream that was truncated, or begun again after a deletion, does not begin at version 0
            if as_of is not None and event.recorded_at > as_of:
                if stream_version(aggregate) < 0:
                    if event.version > 0 and event.id.version != CREATION:
                        await self._check_begins(id, event.version)
                    raise VersionNotFound(stream, f"event as of {as_of}", f"it began at {event.recorded_at}")
                break
            await self._apply(aggregate, event)
        version = stream_version(aggregate)
        if at_version is not None and version != at_version:
            found = f"its last event is version {version}" if version >= 0 else "it begins later"
            raise VersionNotFound(stream, f"version {at_version}", found)
        if version < 0:
            await self._check_begins(id, -1)
        return aggregate

    async def history(self, id: str) -> AsyncIterator[HistoryEntry]:
        """Yield every readable event of the aggregate, oldest first. Raises `StreamNotFound`."""
        async for recorded in self._store().read_stream(self.stream_of(id)):
            metadata = read_metadata(recorded)
            event = decode(recorded, self._view(recorded), metadata, reader=self._reader)
            yield HistoryEntry(recorded.version, recorded.position, event, recorded.recorded_at, metadata)

    def _view(self, recorded: RecordedEvent) -> type[Event]:
        view = self._types.get(recorded.type)
        if view is None:
            raise UnknownEventType(
                f"stream {recorded.stream!r} holds {recorded.type!r} at version {recorded.version}, but "
                f"{self._aggregate.__qualname__} has no @evolves method for it, so its state cannot be known"
            )
        return view

    async def _apply(self, aggregate: A, recorded: RecordedEvent) -> None:
        state = state_of(aggregate)
        if state.version < 0 < recorded.version and recorded.id.version != CREATION:
            await self._check_begins(state.id, recorded.version)
        apply(aggregate, decode(recorded, self._view(recorded), reader=self._reader))
        state.version = recorded.version

    async def _check_begins(self, id: str, first: int) -> None:
        """Raise `StreamTruncated` unless the aggregate begins with `first`, the first version that can be read.

        `first` is -1 if none can be read.
        """
        stream = self.stream_of(id)
        values = (await self._store().get_metadata(stream)).values
        if first < 0 or values.get(BEGINS) != first:
            hiding = ", ".join(f"{key}: {values[key]}" for key in HIDING if key in values)
            raise StreamTruncated(stream, first, hiding or "it has changed in the meantime")

    async def _append(
        self,
        aggregate: A,
        result: Any,
        expected: Expected,
        base: UUID,
        metadata: Mapping[str, Any] | None,
        cause: Cause | None,
        correlation_id: str | None,
    ) -> Changed[A]:
        state = state_of(aggregate)
        recorded = tuple(state.recorded)
        if not recorded:
            return Changed(aggregate, state.version, -1, (), result)
        ids = [_nth(base, n) for n in range(len(recorded))]
        if expected is NO_STREAM:
            ids[0] = _creating(ids[0])
        correlation_id = correlation_id or (None if cause else str(ids[0]))
        events = [
            encode(event, id=identity, metadata=metadata, cause=cause, correlation_id=correlation_id)
            for event, identity in zip(recorded, ids, strict=True)
        ]
        done = await self._store().append(self.stream_of(state.id), events, expected=expected)
        state.recorded.clear()
        state.version = done.version
        return Changed(aggregate, done.version, done.position, recorded, result)


def _decided(decide: Callable[..., Any], aggregate: Aggregate, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if inspect.iscoroutinefunction(decide):
        raise ConfigurationError(
            f"{_named(decide)} is async, but a decision must be pure: look things up before, and pass them as arguments"
        )
    return decide(aggregate, *args, **kwargs)


def _is_of(cause: Cause, event: RecordedEvent) -> bool:
    """Whether the event says that a handler of the same service has emitted it for the same cause."""
    own = read_metadata(event)
    service = str(own.get("tidingsHandler")).partition(".")[0]
    return own.get(CAUSATION) == str(cause.event_id) and service == str(cause.handler).partition(".")[0]


def _nth(base: UUID, n: int) -> UUID:
    return uuid5(base, str(n))


def _creating(id: UUID) -> UUID:
    """Return the id of an event that begins an aggregate, whatever its stream version: UUID version 8 (RFC 9562).

    A stream that was deleted and begun again begins above version 0, just like one whose first events are hidden. This
    id tells them apart.
    """
    return UUID(int=id.int & ~(0xF << 76) | CREATION << 76)


def _named(decide: Callable[..., Any]) -> str:
    return getattr(decide, "__qualname__", repr(decide))
