"""The embedded event store: EventStoreDB's semantics on one SQLite file, or in memory. Here is its asyncio edge.

A file may be used by several processes of one host. Appends of all tasks share commits (one thread writes), reads run
in threads and come in pages, so that neither holds up the event loop.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Concatenate, Final, ParamSpec, TypeVar
from uuid import UUID

import tidings.stores.sqlite.log as reading
from tidings._support.room import no_room
from tidings.errors import (
    ConfigurationError,
    EventTooLarge,
    StoreError,
    StoreUnavailable,
    StreamDeleted,
)
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
    check_text,
)
from tidings.stores.rules import MAX_VERSION, check_event
from tidings.stores.several import checked_several, too_large
from tidings.stores.sqlite.conditions import condition_of
from tidings.stores.sqlite.log import Database, now
from tidings.stores.sqlite.several import Several, several_of
from tidings.stores.sqlite.writer import Appender, Outcome, Write, Writer
from tidings.stores.table import PAGE_EVENTS, Kind, Page, TableStore, View, as_expected, check_stream, checked_size

__all__ = ["SqliteStore", "open_sqlite"]

P = ParamSpec("P")
T = TypeVar("T")

READERS: Final = 4


async def open_sqlite(
    url: str,
    *,
    clock: Callable[[], int] = now,
    busy_timeout: float = 5.0,
    remember_ids: bool = True,
    first_streams: bool = False,
    stride: int = 1,
    limit: int = APPEND_LIMIT,
) -> SqliteStore:
    """Open, and if need be create, the store that `url` names.

    `sqlite:///relative/path`, `sqlite:////absolute/path`, or `memory://name`, which all of a process share while one of
    them has it open (the options are then those of the first). `clock` gives ticks of 100 ns since 1970;
    `busy_timeout` is how many seconds to wait for another process's transaction. With `remember_ids=False` the store
    forgets at opening, as EventStoreDB does, which ids `ANY` and `STREAM_EXISTS` appends had. `stride` is the distance
    of the positions that are given from now on: above 1 not every number between two positions is one. With
    `first_streams` an id that `ANY` and `STREAM_EXISTS` appends recognise is that of its first stream alone, as in
    EventStoreDB: in a second stream it is written again. `limit` is how many bytes one append may have.

    Raises `ConfigurationError` for a URL that cannot be meant, a file of another application, a newer schema;
    `StoreUnavailable` for a file that cannot be opened for writing.
    """
    path, name = _target(url)
    if path is None:
        with _SHARING:
            log = _IN_MEMORY.get(name)
            if log is None:
                database = Database(None, busy_timeout)
                log = _IN_MEMORY[name] = Log(
                    database, Appender(database, clock, remember_ids, stride, first_streams), clock, limit
                )
            log.users += 1
        return SqliteStore(log, name)
    opener = ThreadPoolExecutor(1, thread_name_prefix="tidings-sqlite-open")
    opening = opener.submit(Database, path, busy_timeout)
    opener.shutdown(wait=False)
    try:
        database = await asyncio.wrap_future(opening)
    except asyncio.CancelledError:
        opening.add_done_callback(_close_unused)
        raise
    log = Log(database, Appender(database, clock, remember_ids, stride, first_streams), clock, limit)
    log.users = 1
    return SqliteStore(log, None)


def _close_unused(opening: Future[Database]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


def _target(url: str) -> tuple[str | None, str]:
    """The file, or None and a name in memory. Raises `ConfigurationError`."""
    scheme, separator, rest = url.partition("://")
    scheme = scheme.lower()
    if not separator or scheme not in ("sqlite", "memory"):
        raise ConfigurationError(f"{url!r} names no embedded store: write sqlite:///path/to/file or memory://name")
    if "?" in rest or "#" in rest or "\0" in rest:
        raise ConfigurationError(f"{url!r}: the embedded store's URL ends with its path; nothing follows '?' or '#'")
    if scheme == "memory":
        if "/" in rest or "@" in rest:
            raise ConfigurationError(f"{url!r}: the name of a store in memory is one plain word: memory://name")
        return None, rest
    if not rest.startswith("/"):
        raise ConfigurationError(
            f"{url!r}: three slashes begin a relative path, four an absolute one; did you mean sqlite:///{rest} ?"
        )
    path = rest[1:]
    if path == ":memory:":
        raise ConfigurationError(f"{url!r}: a store in memory is memory://name")
    if not path or path.endswith("/"):
        raise ConfigurationError(f"{url!r} names no file: write sqlite:///path/to/file")
    return path, ""


class Log:
    """One log that is open: its database, the thread that writes, the threads that read; shared by the stores on it."""

    def __init__(self, database: Database, appender: Appender, clock: Callable[[], int], limit: int) -> None:
        self.database = database
        self.clock = clock
        self.limit = limit
        """Bytes of one append, at most."""
        self.users = 0
        self.readers = ThreadPoolExecutor(READERS, thread_name_prefix="tidings-sqlite-reader")
        self.writer = Writer(database, appender, self._finish)

    def _finish(self) -> None:
        self.readers.shutdown()
        self.database.close()


_IN_MEMORY: Final[dict[str, Log]] = {}
_SHARING: Final = threading.Lock()


class SqliteStore(TableStore):
    """`EventStore` on a `Log`. It belongs to the event loop in which it was opened; close it there."""

    def __init__(self, log: Log, name: str | None) -> None:
        super().__init__()
        self._log = log
        self._name = name
        self._outbox: list[Write] = []
        self._answers: dict[Write, asyncio.Future[Appended]] = {}
        self._waiters: set[asyncio.Future[None]] = set()
        self._closed = asyncio.Event()
        self._head = log.writer.join(self)
        self._refused: tuple[float, str] | None = None
        """When the last write failed because the file takes none, by the monotonic clock, and with what."""

    # ---- writing

    def unwritable(self) -> str | None:
        """Return why the file takes no appends, as its file system says; None where nothing is against them. It writes
        nothing, and waits for nothing."""
        path = self._log.database.path
        return None if path is None else no_room(path)

    def refused_within(self, seconds: float) -> str | None:
        """Return what the last write failed with, if that was because the file takes none, and no longer ago."""
        if self._refused is None or time.monotonic() - self._refused[0] > seconds:
            return None
        return self._refused[1]

    def begin(
        self, kind: Kind, stream: str, events: Sequence[EventData], expected: Expected
    ) -> asyncio.Future[Appended]:
        size = checked_size(stream, events)
        if size > self._log.limit:
            raise EventTooLarge(stream, size, self._log.limit)
        self._check_usable()
        return self._submitted(Write(self, kind, stream, tuple(events), as_expected(expected), size))

    async def append_several(self, appends: Sequence[StreamAppend[EventData]]) -> AppendedSeveral:
        asked, size = checked_several(appends, checked_size)
        if size > self._log.limit:
            raise too_large(asked, size, self._log.limit)
        append = several_of(self, asked, size)
        appended = await self.begin_several(append)
        return AppendedSeveral(append.versions, appended.position)

    async def abilities(self) -> frozenset[Ability]:
        return frozenset(Ability)

    def begin_several(self, append: Several) -> asyncio.Future[Appended]:
        """As `begin`, for an append to several streams."""
        for stream, event in append.records:
            check_event(stream, event)
            check_stream(stream)
        if append.size > self._log.limit:
            raise EventTooLarge(append.stream, append.size, self._log.limit)
        self._check_usable()
        return self._submitted(append)

    def _submitted(self, write: Write) -> asyncio.Future[Appended]:
        answer = self._answers[write] = self._loop.create_future()
        # What tasks write in one round of the loop is handed over together: one wake-up, and rarely a small commit.
        if not self._outbox:
            self._loop.call_soon(self._hand_over)
        self._outbox.append(write)
        return answer

    def _hand_over(self) -> None:
        writes, self._outbox = self._outbox, []
        if writes:
            self._log.writer.submit(writes)

    def settled(self, outcomes: list[tuple[Write, Outcome]], head: int) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._settle, outcomes, head)

    def left(self) -> None:
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._closed.set)

    def _settle(self, outcomes: list[tuple[Write, Outcome]], head: int) -> None:
        for write, outcome in outcomes:
            answer = self._answers.pop(write)
            if answer.done():  # its caller was cancelled
                continue
            if isinstance(outcome, StoreUnavailable):
                self._refused = time.monotonic(), str(outcome)
            elif not isinstance(outcome, StoreError):
                self._refused = None
            if isinstance(outcome, StoreError):
                answer.set_exception(outcome)
            else:
                answer.set_result(outcome)
        if head > self._head:
            self._head = head
            self._wake()

    # ---- reading

    async def _view_of(self, stream: str) -> View:
        return await self.look(reading.view_of, stream, self._log.clock())

    async def _page_of_stream(
        self, stream: str, view: View, backwards: bool, count: int
    ) -> tuple[list[RecordedEvent], bool]:
        return await self.look(reading.page_of_stream, stream, view, backwards, count)

    async def _page_of_all(self, after: int, before: int, backwards: bool, filter: Filter, count: int) -> Page:
        return await self.look(reading.page_of_all, after, before, backwards, _condition(filter), count)

    async def subscribe_all(
        self, *, after: int = -1, filter: Filter = EVERYTHING
    ) -> AsyncIterator[RecordedEvent | Checkpoint | CaughtUp]:
        behind = True
        page = Page([], after, False)
        self.watch(+1)
        try:
            while True:
                after = page.reached
                page = await self._page_of_all(after, MAX_VERSION, False, filter, PAGE_EVENTS)
                for event in page.events:
                    yield event
                told = page.events[-1].position if page.events else after
                if page.reached > told:
                    yield Checkpoint(page.reached)
                if not page.end:
                    behind = True
                    continue
                if behind:
                    behind = False
                    yield CaughtUp(page.reached)
                await self.beyond(page.reached)
        finally:
            self.watch(-1)

    async def subscribe_stream(
        self, stream: str, *, after_version: int = -1
    ) -> AsyncIterator[RecordedEvent | CaughtUp]:
        check_stream(stream)
        behind = True
        self.watch(+1)
        try:
            while True:
                page = await self.look(reading.follow, stream, after_version, behind, self._log.clock())
                for event in page.events:
                    yield event
                    if event.version == MAX_VERSION:
                        raise StreamDeleted(stream)
                after_version = page.version
                if not page.end:
                    continue
                if behind:
                    behind = False
                    yield CaughtUp(page.reached)
                await self.beyond(page.reached)
        finally:
            self.watch(-1)

    async def beyond(self, position: int) -> None:
        """Wait until the log goes on behind `position`. Raises `StoreUnavailable` when the store is closed."""
        while self._head <= position:
            self._check_usable()
            waiter = self._loop.create_future()
            self._waiters.add(waiter)
            try:
                await waiter
            finally:
                self._waiters.discard(waiter)

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    @property
    def heard(self) -> int:
        """A position that the log had reached when this store last heard of it: `head`, without a look."""
        return self._head

    async def head(self) -> int:
        return await self.look(reading.head)

    async def log_id(self) -> UUID:
        return await self.look(reading.log_id)

    async def get_metadata(self, stream: str) -> StreamMetadata:
        check_stream(stream)
        return await self.look(reading.metadata_of, stream)

    async def look(
        self, job: Callable[Concatenate[sqlite3.Connection, P], T], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """`job(connection, ...)` on a thread that reads. The connection is the job's own for as long as it runs."""
        self._check_usable()
        return await self._loop.run_in_executor(
            self._log.readers, lambda: self._log.database.read(job, *args, **kwargs)
        )

    # ---- closing

    def watch(self, more: int) -> None:
        """Somebody begins (+1) or ends (-1) to wait for what other processes append: see `beyond`."""
        self._log.writer.watch(more)

    async def close(self) -> None:
        """End: appends that began are finished, reads and subscriptions raise `StoreUnavailable` at their next step."""
        if not self._closing:
            self._closing = True
            self._hand_over()
            with _SHARING:
                self._log.users -= 1
                last = self._log.users == 0
                if last and self._name is not None:
                    del _IN_MEMORY[self._name]
            self._log.writer.leave(self, last=last)
            self._wake()
            await self._closed.wait()
            if last:
                self._log.writer.wait()
        await self._closed.wait()


def _condition(filter: Filter) -> tuple[str, tuple[str, ...]]:
    for text in (*filter.types, *filter.stream_prefixes, *filter.exclude_stream_prefixes):
        check_text(text)
    return condition_of(filter)
