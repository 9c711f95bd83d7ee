"""The PostgreSQL event store: EventStoreDB's semantics on one table. Here is its asyncio edge.

Appends of all tasks share transactions (one task writes), reads come in pages on connections of their own. Any number
of processes may use one log.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Concatenate, Final, ParamSpec, TypeVar
from uuid import UUID

import tidings.stores.postgresql.log as reading
from tidings.errors import EventTooLarge, StoreUnavailable, StreamDeleted
from tidings.stores import (
    APPEND_LIMIT,
    EVERYTHING,
    Ability,
    Appended,
    AppendedSeveral,
    CaughtUp,
    Checkpoint,
    EventData,
    Expected,
    Filter,
    RecordedEvent,
    StreamAppend,
    StreamMetadata,
)
from tidings.stores.postgresql.connections import Connection, Server
from tidings.stores.postgresql.continuity import Continuity
from tidings.stores.postgresql.decisions import Several, Write
from tidings.stores.postgresql.watcher import Watcher
from tidings.stores.postgresql.writer import Writer
from tidings.stores.rules import MAX_VERSION
from tidings.stores.several import checked_several, too_large
from tidings.stores.table import PAGE_EVENTS, Kind, Page, TableStore, View, as_expected, check_stream, checked_size

__all__ = ["PostgreSQLStore", "open_postgresql"]

ROW_BYTES: Final = 100
"""Bytes of work that an event is, at least: an entry in each of three indexes, its place in the statement."""
SENT_LIMIT: Final = 128 * 1024 * 1024
"""Bytes of one append as it is sent: a message of more than 1 GiB costs the connection."""
WITH_NAMES: Final = "with the stream's name for each event, the"
P = ParamSpec("P")
T = TypeVar("T")


async def open_postgresql(url: str) -> PostgreSQLStore:
    """Open, and if need be create, the log in the database that `url` names.

    `postgresql://user:password@host/database`, as libpq knows it, or as a service's `TIDINGS_DATABASE` has it
    (`postgresql+asyncpg://`). `?connections=` says how many connections read (4).

    Raises `ConfigurationError` for a URL that cannot be meant, a schema of another application or a newer one;
    `StoreUnavailable` for a server that cannot be reached, or takes no writes.
    """
    store = PostgreSQLStore(Server(url))
    await store.start()
    return store


class PostgreSQLStore(TableStore):
    """`EventStore` on a PostgreSQL database. It belongs to the event loop in which it was opened; close it there."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self._server = server
        self._log = Continuity(server.shown)
        server.check = self._log.check
        self._writer = Writer(server, self._log, self._reached)
        self._watcher = Watcher(server, self._reached, self._failed)
        self._waiters: set[asyncio.Future[None]] = set()
        self._closed = asyncio.Event()

    async def start(self) -> None:
        """Connect. Raises as `open_postgresql`."""
        await self._writer.start()

    # ---- writing

    def begin(
        self, kind: Kind, stream: str, events: Sequence[EventData], expected: Expected
    ) -> asyncio.Future[Appended]:
        size = checked_size(stream, events)
        if size > APPEND_LIMIT:
            raise EventTooLarge(stream, size, APPEND_LIMIT)
        sent = size + _beside(stream, events)
        if sent > SENT_LIMIT:
            raise EventTooLarge(stream, sent, SENT_LIMIT, WITH_NAMES)
        self._check_usable()
        write = Write(kind, stream, tuple(events), as_expected(expected), sent, self._loop.create_future())
        self._writer.submit(write)
        return write.answer

    async def append_several(self, appends: Sequence[StreamAppend[EventData]]) -> AppendedSeveral:
        asked, size = checked_several(appends, checked_size)
        if size > APPEND_LIMIT:
            raise too_large(asked, size, APPEND_LIMIT)
        sent = size + sum(_beside(stream, events) for stream, events, _ in asked)
        if sent > SENT_LIMIT:
            raise too_large(asked, sent, SENT_LIMIT, WITH_NAMES)
        self._check_usable()
        answer: asyncio.Future[AppendedSeveral] = self._loop.create_future()
        parts = [
            Write(Kind.APPEND, stream, tuple(events), as_expected(expected), 0, answer)
            for stream, events, expected in asked
        ]
        self._writer.submit(Several(parts, sent, answer))
        return await answer

    async def abilities(self) -> frozenset[Ability]:
        return frozenset(Ability)

    # ---- reading

    async def _view_of(self, stream: str) -> View:
        return await self._look(reading.view_of, stream)

    async def _page_of_stream(
        self, stream: str, view: View, backwards: bool, count: int
    ) -> tuple[list[RecordedEvent], bool]:
        return await self._look(reading.page_of_stream, stream, view, backwards, count)

    async def _page_of_all(self, after: int, before: int, backwards: bool, filter: Filter, count: int) -> Page:
        return await self._look(reading.page_of_all, after, before, backwards, filter, count)

    async def subscribe_all(
        self, *, after: int = -1, filter: Filter = EVERYTHING
    ) -> AsyncIterator[RecordedEvent | Checkpoint | CaughtUp]:
        behind = True
        page = Page([], after, False)
        self._watcher.watch(+1)
        try:
            while True:
                after, known = page.reached, self._log.head
                page = await self._page_of_all(after, MAX_VERSION, False, filter, PAGE_EVENTS)
                for event in page.events:
                    yield event
                told = after
                if page.events:
                    told = page.events[-1].position
                    self._reached(told)
                if page.reached > told:
                    yield Checkpoint(page.reached)
                if not page.end:
                    behind = True
                    continue
                self._log.check_end(page.reached, known)
                if behind:
                    behind = False
                    yield CaughtUp(page.reached)
                await self._beyond(page.reached)
        finally:
            self._watcher.watch(-1)

    async def subscribe_stream(
        self, stream: str, *, after_version: int = -1
    ) -> AsyncIterator[RecordedEvent | CaughtUp]:
        check_stream(stream)
        behind = True
        self._watcher.watch(+1)
        try:
            while True:
                known = self._log.head
                page = await self._look(reading.follow, stream, after_version, behind)
                for event in page.events:
                    yield event
                    if event.version == MAX_VERSION:
                        raise StreamDeleted(stream)
                after_version = page.version
                if not page.end:
                    continue
                self._log.check_end(page.reached, known)
                if behind:
                    behind = False
                    yield CaughtUp(page.reached)
                await self._beyond(page.reached)
        finally:
            self._watcher.watch(-1)

    async def _beyond(self, position: int) -> None:
        """Wait until the log goes on behind `position`. Raises `StoreUnavailable` when it cannot be looked at."""
        while self._log.head <= position:
            self._check_usable()
            self._watcher.ensure()
            waiter: asyncio.Future[None] = self._loop.create_future()
            self._waiters.add(waiter)
            try:
                await waiter
            finally:
                self._waiters.discard(waiter)

    def _reached(self, head: int) -> None:
        if head > self._log.head:
            self._log.head = head
            self._wake()

    def _failed(self, error: StoreUnavailable) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_exception(StoreUnavailable(str(error), waiting_helps=error.waiting_helps))

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def head(self) -> int:
        return await self._look(reading.head)

    async def log_id(self) -> UUID:
        return await self._look(reading.log_id)

    async def get_metadata(self, stream: str) -> StreamMetadata:
        check_stream(stream)
        return await self._look(reading.metadata_of, stream)

    async def _look(
        self, job: Callable[Concatenate[Connection, P], Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """`job(connection, ...)` on a connection that reads."""
        self._check_usable()
        return await self._server.read(job, *args, **kwargs)

    # ---- closing

    async def close(self) -> None:
        """End: appends that began are finished, reads and subscriptions raise `StoreUnavailable` at their next step."""
        if not self._closing:
            self._closing = True
            self._wake()
            try:
                await self._writer.close()
                await self._watcher.close()
                await self._server.close()
            finally:
                self._closed.set()
        await self._closed.wait()


def _beside(stream: str, events: Sequence[EventData]) -> int:
    """Return the bytes that events are sent with, beside their own."""
    return len(events) * (ROW_BYTES + len(stream.encode()))
