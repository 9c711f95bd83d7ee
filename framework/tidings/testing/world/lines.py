"""The lines from one process to the log and to the bus. They can be cut; nothing of a dead process passes them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

from tidings.buses import Consumer, EventBus, Publisher, Subscription, TopologyItem
from tidings.errors import BusUnavailable, StoreUnavailable
from tidings.stores import (
    ANY,
    EVERYTHING,
    Ability,
    Appended,
    AppendedSeveral,
    CaughtUp,
    Checkpoint,
    EventData,
    EventStore,
    Expected,
    Filter,
    RecordedEvent,
    StreamAppend,
    StreamMetadata,
)

__all__ = ["CUT", "KILLED", "Line"]

T = TypeVar("T")

KILLED, CUT = "killed", "cut"
"""Why a line may be broken: its process is dead, or the test has cut it."""


class Line:
    """What one process calls its store and its bus."""

    def __init__(
        self,
        store: EventStore,
        bus: EventBus,
        delay: Callable[[], float] | None = None,
        appended: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """`delay` returns the seconds that the next answer of the log takes. `appended` is awaited after appends."""
        self._broken: dict[str, str] = {}
        """Why nothing passes: each reason, and its words."""
        self.delay = delay
        self.appended = appended
        self.store: EventStore = _Store(self, store)
        self.bus: EventBus = _Bus(self, bus)
        self.connections: dict[Any, None] = {}

    @property
    def cut(self) -> str | None:
        """Why nothing passes; None if all passes."""
        return next(iter(self._broken.values()), None)

    def break_(self, reason: str, words: str) -> None:
        """Let nothing pass any more, and end what is open."""
        self._broken[reason] = words
        for connection in list(self.connections):
            if hasattr(connection, "lose"):  # a real one ends with its task
                connection.lose(words)

    def mend(self, reason: str) -> None:
        """Undo `break_`. Harmless where it is not broken."""
        self._broken.pop(reason, None)


class _Store(EventStore):
    def __init__(self, line: Line, inner: EventStore) -> None:
        self._line = line
        self._inner = inner

    def _check(self) -> None:
        if self._line.cut is not None:
            raise StoreUnavailable(self._line.cut)

    async def _late(self) -> None:
        """Take the time of an answer."""
        if self._line.delay is not None:
            await asyncio.sleep(self._line.delay())

    async def _read(self, reading: AsyncIterator[T]) -> AsyncIterator[T]:
        self._check()
        await self._late()
        async for item in reading:
            self._check()
            yield item

    async def append(self, stream: str, events: Sequence[EventData], *, expected: Expected = ANY) -> Appended:
        return await self._write(lambda: self._inner.append(stream, events, expected=expected))

    async def append_several(self, appends: Sequence[StreamAppend[EventData]]) -> AppendedSeveral:
        return await self._write(lambda: self._inner.append_several(appends))

    async def abilities(self) -> frozenset[Ability]:
        self._check()
        return await self._inner.abilities()

    async def _write(self, write: Callable[[], Awaitable[T]]) -> T:
        self._check()
        await self._late()
        done = await write()
        if self._line.appended is not None:
            await self._line.appended()
        await self._late()
        self._check()
        return done

    def read_stream(
        self, stream: str, *, start: int | None = None, backwards: bool = False, limit: int | None = None
    ) -> AsyncIterator[RecordedEvent]:
        return self._read(self._inner.read_stream(stream, start=start, backwards=backwards, limit=limit))

    def read_all(
        self, *, after: int = -1, backwards: bool = False, limit: int | None = None, filter: Filter = EVERYTHING
    ) -> AsyncIterator[RecordedEvent]:
        return self._read(self._inner.read_all(after=after, backwards=backwards, limit=limit, filter=filter))

    def subscribe_all(
        self, *, after: int = -1, filter: Filter = EVERYTHING
    ) -> AsyncIterator[RecordedEvent | Checkpoint | CaughtUp]:
        return self._read(self._inner.subscribe_all(after=after, filter=filter))

    def subscribe_stream(self, stream: str, *, after_version: int = -1) -> AsyncIterator[RecordedEvent | CaughtUp]:
        return self._read(self._inner.subscribe_stream(stream, after_version=after_version))

    async def head(self) -> int:
        self._check()
        await self._late()
        return await self._inner.head()

    async def log_id(self) -> Any:
        self._check()
        return await self._inner.log_id()

    async def get_metadata(self, stream: str) -> StreamMetadata:
        self._check()
        return await self._inner.get_metadata(stream)

    async def set_metadata(self, stream: str, values: Mapping[str, Any], *, expected: Expected = ANY) -> Appended:
        self._check()
        return await self._inner.set_metadata(stream, values, expected=expected)

    async def delete(self, stream: str, *, expected: Expected = ANY) -> None:
        self._check()
        await self._inner.delete(stream, expected=expected)

    async def tombstone(self, stream: str, *, expected: Expected = ANY) -> None:
        self._check()
        await self._inner.tombstone(stream, expected=expected)

    async def close(self) -> None:
        """The world closes it."""


class _Bus:
    def __init__(self, line: Line, inner: EventBus) -> None:
        self.within_process = getattr(inner, "within_process", False)
        self._line = line
        self._inner = inner

    def _check(self) -> None:
        if self._line.cut is not None:
            raise BusUnavailable(self._line.cut)

    async def provision(self, subscription: Subscription | None = None) -> None:
        self._check()
        await self._inner.provision(subscription)

    async def delete(self, subscriptions: Sequence[Subscription]) -> None:
        self._check()
        await self._inner.delete(subscriptions)

    async def inspect(self, subscriptions: Sequence[Subscription]) -> list[TopologyItem]:
        self._check()
        return await self._inner.inspect(subscriptions)

    @asynccontextmanager
    async def publisher(self, *, lock: str | None = None) -> AsyncIterator[Publisher]:
        self._check()
        async with self._inner.publisher(lock=lock) as publisher:
            with self._open(publisher):
                yield publisher

    @asynccontextmanager
    async def consume(self, subscription: Subscription, *, prefetch: int = 1000) -> AsyncIterator[Consumer]:
        self._check()
        async with self._inner.consume(subscription, prefetch=prefetch) as consumer:
            with self._open(consumer):
                yield consumer

    @contextmanager
    def _open(self, connection: Any) -> Iterator[None]:
        connections = self._line.connections
        connections[connection] = None
        try:
            yield
        finally:
            connections.pop(connection, None)

    async def close(self) -> None:
        """The world closes it."""
