"""Marks each error of a service's own store, bus and database with the object that raised it.

An outage of these pauses the service. The same error from another store, bus or database, from another service's
client, or raised by a handler itself, is a failure of that handler. The type cannot tell them apart, the mark can: it
is kept through threads, exception groups and `raise ... from`. It asks nobody.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast
from uuid import UUID

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from tidings._support.ownership import mark, owner_of, related
from tidings._support.writes import Writes
from tidings.database.outages import is_outage, waits_for_itself
from tidings.errors import BusUnavailable, DatabaseUnavailable, StoreError, StoreUnavailable, StreamForbidden
from tidings.stores import (
    ANY,
    EVERYTHING,
    Ability,
    Appended,
    AppendedSeveral,
    EventData,
    EventStore,
    Expected,
    Filter,
    RecordedEvent,
    StreamAppend,
)

if TYPE_CHECKING:
    from tidings.buses import Consumer, Delivery, EventBus, Publisher, Subscription
    from tidings.database.engine import Database
    from tidings.protocol.message import Message

__all__ = ["PROBED", "Ours", "OwnBus", "OwnStore", "inner", "marking"]

T = TypeVar("T")

PROBED: Final = "tidings_probe"
"""The stream that is appended to in order to learn whether a log takes writes."""


@contextmanager
def marking(owner: object) -> Iterator[None]:
    """Mark what is raised within the block because a store or a bus is away as the error of `owner`, an adapter."""
    try:
        yield
    except (StoreUnavailable, BusUnavailable) as error:
        mark(error, owner)
        raise


class Ours:
    """The objects of one service. `store` and `bus` are the adapters themselves, whatever stands before them."""

    def __init__(self, store: object, bus: object, database: Database) -> None:
        self._store = inner(store)
        self._bus = inner(bus)
        self._database = database
        self._dialect = database.engine.dialect

    def outage(self, error: BaseException) -> BaseException | None:
        """Which error, of those that `error` comes from, says that an object of this service's own is away, so that
        waiting heals it; None for a failure of the handler."""
        return next((each for each in related(error) if self._is_outage(each)), None)

    def waits_for_itself(self, error: BaseException) -> bool:
        """Whether a handler with a session has waited for the one writer that it holds itself."""
        return any(waits_for_itself(each, self._dialect) for each in related(error))

    def _is_outage(self, error: BaseException) -> bool:
        owner = owner_of(error)
        match error:
            case StreamForbidden():
                return False
            case StoreUnavailable():
                return owner is self._store and error.waiting_helps
            case BusUnavailable():
                return owner is self._bus
            case DatabaseUnavailable():
                # All connections taken is the doing of handlers, and ending them all would help none of them.
                return owner is self._database and not isinstance(error.__cause__, PoolTimeout)
            case DBAPIError():
                return is_outage(error, self._dialect)
        return False


def inner(thing: object) -> object:
    """What an `OwnStore` or `OwnBus` stands before; anything else itself."""
    return thing.inner if isinstance(thing, OwnStore | OwnBus) else thing


class _Marked:
    """Calls of a store, whose errors are marked as its own."""

    def __init__(self, store: EventStore) -> None:
        self.inner = store
        self.writes = Writes()

    def __getattr__(self, name: str) -> Any:  # what an adapter has beyond the port
        return getattr(self.inner, name)

    def __repr__(self) -> str:
        return repr(self.inner)

    async def _write(self, writing: Awaitable[T]) -> T:
        try:
            done = await writing
        except StoreUnavailable as error:
            mark(error, self.inner)
            if not isinstance(error, StreamForbidden):
                self.writes.failed(error)
            raise
        self.writes.proven()
        return done

    async def _ask(self, asking: Awaitable[T]) -> T:
        with marking(self.inner):
            return await asking

    async def _read(self, reading: AsyncIterator[T]) -> AsyncIterator[T]:
        with marking(self.inner):
            async with aclosing(cast("Any", reading)) as source:
                async for item in source:
                    yield item


class _Probed(_Marked):
    """A store of which is known whether it takes writes, also while nobody writes."""

    def __init__(self, store: EventStore) -> None:
        super().__init__(store)
        self.may_probe = True
        """The user was not refused an append that only tries whether the log takes it."""

    async def probe_writes(self) -> None:
        """Append one event to a stream of Tidings' own that keeps one: `writes` knows then whether the log takes it. A
        user who may not append there learns nothing, and is not asked again."""
        try:
            done = await self._write(self.inner.append(PROBED, [EventData("tidings_Probed", b"{}")]))
            if done.version == 0:
                await self._write(self.inner.set_metadata(PROBED, {"$maxCount": 1}))
        except StreamForbidden:
            self.may_probe = False
        except StoreError:
            pass  # `writes` knows

    @property
    def is_local(self) -> bool:
        """Its file is on this machine, so that `unwritable` can look at it."""
        return hasattr(self.inner, "unwritable")

    def unwritable(self) -> str | None:
        """Return why the log takes no appends, as the file system says; None where nothing is against them, and for a
        log that is elsewhere."""
        return cast("str | None", self.inner.unwritable()) if hasattr(self.inner, "unwritable") else None

    async def is_quiet(self, seconds: float) -> bool:
        """Return whether nothing shows that the log took an append of anybody within so many seconds."""
        if time.monotonic() - self.writes.last_at <= seconds or not self.may_probe:
            return False
        async for event in self._read(self.inner.read_all(backwards=True, limit=1)):
            return time.time() - event.ticks / 1e7 > seconds
        return True


class OwnStore(_Probed, EventStore):
    """Stands before a service's own store: marks its errors, and learns whether it takes writes."""

    @classmethod
    def of(cls, store: EventStore) -> OwnStore:
        """The store itself, where it is one already: who shares it shares what is known of it."""
        return store if isinstance(store, OwnStore) else cls(store)

    async def append(self, stream: str, events: Sequence[EventData], *, expected: Expected = ANY) -> Appended:
        return await self._write(self.inner.append(stream, events, expected=expected))

    async def append_several(self, appends: Sequence[StreamAppend[EventData]]) -> AppendedSeveral:
        return await self._write(self.inner.append_several(appends))

    async def abilities(self) -> frozenset[Ability]:
        return await self._ask(self.inner.abilities())

    async def set_metadata(self, stream: str, values: Mapping[str, Any], *, expected: Expected = ANY) -> Appended:
        return await self._write(self.inner.set_metadata(stream, values, expected=expected))

    def read_stream(
        self, stream: str, *, start: int | None = None, backwards: bool = False, limit: int | None = None
    ) -> AsyncIterator[RecordedEvent]:
        return self._read(self.inner.read_stream(stream, start=start, backwards=backwards, limit=limit))

    def read_all(
        self, *, after: int = -1, backwards: bool = False, limit: int | None = None, filter: Filter = EVERYTHING
    ) -> AsyncIterator[RecordedEvent]:
        return self._read(self.inner.read_all(after=after, backwards=backwards, limit=limit, filter=filter))

    def subscribe_all(self, *, after: int = -1, filter: Filter = EVERYTHING) -> AsyncIterator[Any]:
        return self.inner.subscribe_all(after=after, filter=filter)  # the relay's, which reads as fast as it can

    def subscribe_stream(self, stream: str, *, after_version: int = -1) -> AsyncIterator[Any]:
        return self._read(self.inner.subscribe_stream(stream, after_version=after_version))

    async def head(self) -> int:
        return await self._ask(self.inner.head())

    async def log_id(self) -> UUID:
        return await self._ask(self.inner.log_id())

    async def get_metadata(self, stream: str) -> Any:
        return await self._ask(self.inner.get_metadata(stream))

    async def delete(self, stream: str, *, expected: Expected = ANY) -> None:
        await self._ask(self.inner.delete(stream, expected=expected))

    async def tombstone(self, stream: str, *, expected: Expected = ANY) -> None:
        await self._ask(self.inner.tombstone(stream, expected=expected))

    async def close(self) -> None:
        await self.inner.close()


class OwnBus:
    """Stands before a service's own bus where handlers may use it: marks its errors."""

    def __init__(self, bus: EventBus) -> None:
        self.inner: EventBus = cast("EventBus", inner(bus))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __repr__(self) -> str:
        return repr(self.inner)

    async def provision(self, subscription: Subscription | None = None) -> None:
        with marking(self.inner):
            await self.inner.provision(subscription)

    async def delete(self, subscriptions: Sequence[Subscription]) -> None:
        with marking(self.inner):
            await self.inner.delete(subscriptions)

    async def inspect(self, subscriptions: Sequence[Subscription]) -> Any:
        with marking(self.inner):
            return await self.inner.inspect(subscriptions)

    @asynccontextmanager
    async def publisher(self, *, lock: str | None = None) -> AsyncIterator[Publisher]:
        async with self._entered(self.inner.publisher(lock=lock)) as publisher:
            yield cast("Publisher", _OwnPublisher(publisher, self.inner))

    @asynccontextmanager
    async def consume(self, subscription: Subscription, *, prefetch: int = 1000) -> AsyncIterator[Consumer]:
        async with self._entered(self.inner.consume(subscription, prefetch=prefetch)) as consumer:
            yield cast("Consumer", _OwnConsumer(consumer, self.inner))

    @asynccontextmanager
    async def _entered(self, entering: AbstractAsyncContextManager[T]) -> AsyncIterator[T]:
        """Only what entering raises is the bus's: what is raised within the block may come from anywhere."""
        with marking(self.inner):
            entered = await entering.__aenter__()
        try:
            yield entered
        except BaseException as error:
            if not await entering.__aexit__(type(error), error, error.__traceback__):
                raise
        else:
            await entering.__aexit__(None, None, None)


class _OwnPublisher:
    def __init__(self, publisher: Publisher, bus: object) -> None:
        self._publisher = publisher
        self._bus = bus

    def __getattr__(self, name: str) -> Any:
        return getattr(self._publisher, name)

    async def send(self, message: Message) -> None:
        with marking(self._bus):
            await self._publisher.send(message)

    async def begin(self, message: Message) -> asyncio.Future[Any]:
        with marking(self._bus):
            confirm = await self._publisher.begin(message)
        return _marked(confirm, self._bus)


class _OwnConsumer:
    def __init__(self, consumer: Consumer, bus: object) -> None:
        self._consumer = consumer
        self._bus = bus
        self._deliveries = aiter(consumer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._consumer, name)

    def __aiter__(self) -> AsyncIterator[Delivery]:
        return self

    async def __anext__(self) -> Delivery:
        with marking(self._bus):
            return await anext(self._deliveries)


def _marked(future: asyncio.Future[T], owner: object) -> asyncio.Future[T]:
    """Return a future that ends as this one does; an error of a bus that is away is marked as that of `owner`."""
    told: asyncio.Future[T] = future.get_loop().create_future()

    def tell(ended: asyncio.Future[T]) -> None:
        error = None if ended.cancelled() else ended.exception()
        if isinstance(error, BusUnavailable):
            mark(error, owner)
        if told.done():
            return
        if ended.cancelled():
            told.cancel()
        elif error is not None:
            told.set_exception(error)
        else:
            told.set_result(ended.result())

    future.add_done_callback(tell)
    return told
