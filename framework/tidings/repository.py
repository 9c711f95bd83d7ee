"""Aggregates loaded from their streams and changed with optimistic concurrency. The stream is the only state."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Generic, TypeVar
from uuid import UUID, uuid4, uuid5

from tidings.aggregate import Aggregate, apply, begin, declared, state_of, stream_of, stream_version
from tidings.codec import CAUSATION, CORRELATION, Cause, decode, encode, read_metadata
from tidings.errors import ConfigurationError, StreamNotFound, UnknownEventType, VersionNotFound, WrongExpectedVersion
from tidings.events import Event, Registry
from tidings.stores import NO_STREAM, EventStore, Expected, RecordedEvent

__all__ = ["Changed", "HistoryEntry", "Repository"]

A = TypeVar("A", bound=Aggregate)

CONFLICTS: Final = 20
"""Decisions lost to others before a change without `expected` gives up."""


@dataclass(frozen=True, slots=True)
class Changed(Generic[A]):
    """The outcome of `create` or `change`."""

    aggregate: A
    version: int
    """The stream's version now."""
    position: int
    """Global position of the last event appended; -1 when nothing was."""
    events: tuple[Event, ...]
    """What was appended: empty when nothing was recorded, or it had been appended before."""
    result: Any = None
    """What the decision returned; None when it was not taken, because a handler's earlier attempt had taken it."""


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
    """Obtain one with `service.repository(Order)`; it works while the service runs.

    A decision is a method of the aggregate, called with the loaded aggregate and the further arguments; the events it
    records are appended together. An exception that it raises passes through, and nothing is appended.
    """

    def __init__(self, aggregate: type[A], store: Callable[[], EventStore]) -> None:
        self._aggregate = aggregate
        self._store = store
        self._reader = f"aggregate {aggregate.__qualname__}"
        self._types = Registry(self._reader)
        for event in declared(aggregate).evolutions:
            self._types.add(event)

    def stream_of(self, id: str) -> str:
        """Return the name of the aggregate's stream."""
        return stream_of(self._aggregate, id)

    async def create(
        self,
        id: str,
        decide: Callable[..., Any],
        *args: Any,
        metadata: Mapping[str, Any] | None = None,
        correlation_id: str | None = None,
        **kwargs: Any,
    ) -> Changed[A]:
        """Decide on a new aggregate; raises `WrongExpectedVersion` when its stream has events."""
        aggregate: A = begin(self._aggregate, id)
        result = _decided(decide, aggregate, args, kwargs)
        if not state_of(aggregate).recorded:
            raise ConfigurationError(f"{_named(decide)} recorded nothing, so {id!r} was not created")
        return await self._append(aggregate, result, NO_STREAM, uuid4(), metadata, None, correlation_id)

    async def change(
        self,
        id: str,
        decide: Callable[..., Any],
        *args: Any,
        expected: int | None = None,
        metadata: Mapping[str, Any] | None = None,
        correlation_id: str | None = None,
        **kwargs: Any,
    ) -> Changed[A]:
        """Decide on an existing aggregate.

        With `expected`, the stream must stand at that version (`WrongExpectedVersion`); without it a decision that
        lost to another is taken again on the new state. Raises `StreamNotFound`.
        """
        for left in range(CONFLICTS, -1, -1):
            aggregate = await self.load(id)
            version = stream_version(aggregate)
            if expected is not None and version != expected:
                raise WrongExpectedVersion(stream_of(self._aggregate, id), f"version {expected}", version)
            result = _decided(decide, aggregate, args, kwargs)
            try:
                return await self._append(aggregate, result, version, uuid4(), metadata, None, correlation_id)
            except WrongExpectedVersion:
                if expected is not None or not left:
                    raise
        raise AssertionError("unreachable")

    async def change_for(
        self,
        cause: Cause,
        since: int,
        base: UUID | tuple[UUID, ...],
        id: str,
        decide: Callable[..., Any],
        *args: Any,
        metadata: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Changed[A]:
        """Do what `Context.change` does: like `change`, but skipped when the stream holds it since position `since`.

        The first `base` makes the ids of new events; those of any other one are looked for, too.
        """
        bases = base if isinstance(base, tuple) else (base,)
        known = {_nth(one, 0).bytes for one in bases}
        for left in range(CONFLICTS, -1, -1):
            aggregate: A = begin(self._aggregate, id)
            done = -1
            async for event in self._store().read_stream(stream_of(self._aggregate, id)):
                self._apply(aggregate, event)
                if event.position > since and event.id_bytes in known:
                    done = event.position
            if done >= 0:
                return Changed(aggregate, stream_version(aggregate), done, ())
            result = _decided(decide, aggregate, args, kwargs)
            try:
                return await self._append(aggregate, result, stream_version(aggregate), bases[0], metadata, cause, None)
            except WrongExpectedVersion:
                if not left:
                    raise
        raise AssertionError("unreachable")

    async def load(self, id: str, *, at_version: int | None = None, as_of: datetime | None = None) -> A:
        """The aggregate now, at a version (that event included), or as of a moment (stops at the first later event).

        Raises `StreamNotFound`; `VersionNotFound` for a version or moment that the stream does not reach.
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
                break  # a stream that was truncated, or begun anew after a deletion, does not begin at version 0
            if as_of is not None and event.recorded_at > as_of:
                if stream_version(aggregate) < 0:
                    raise VersionNotFound(stream, f"event as of {as_of}", f"it began at {event.recorded_at}")
                break
            self._apply(aggregate, event)
        version = stream_version(aggregate)
        if at_version is not None and version != at_version:
            found = f"its last event is version {version}" if version >= 0 else "it begins later"
            raise VersionNotFound(stream, f"version {at_version}", found)
        if version < 0:
            raise StreamNotFound(stream)
        return aggregate

    async def history(self, id: str) -> AsyncIterator[HistoryEntry]:
        """Every event of the aggregate, oldest first. Raises `StreamNotFound`."""
        async for recorded in self._store().read_stream(stream_of(self._aggregate, id)):
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

    def _apply(self, aggregate: A, recorded: RecordedEvent) -> None:
        apply(aggregate, decode(recorded, self._view(recorded), reader=self._reader))
        state_of(aggregate).version = recorded.version

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
        correlation_id = correlation_id or (None if cause else str(_nth(base, 0)))
        events = [
            encode(event, id=_nth(base, n), metadata=metadata, cause=cause, correlation_id=correlation_id)
            for n, event in enumerate(recorded)
        ]
        done = await self._store().append(stream_of(self._aggregate, state.id), events, expected=expected)
        state.recorded.clear()
        state.version = done.version
        return Changed(aggregate, done.version, done.position, recorded, result)


def _decided(decide: Callable[..., Any], aggregate: Aggregate, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if inspect.iscoroutinefunction(decide):
        raise ConfigurationError(
            f"{_named(decide)} is async, but a decision is pure: look things up before, and pass them as arguments"
        )
    return decide(aggregate, *args, **kwargs)


def _nth(base: UUID, n: int) -> UUID:
    return uuid5(base, str(n))


def _named(decide: Callable[..., Any]) -> str:
    return getattr(decide, "__qualname__", repr(decide))
